//! `atproto-devnet replay`: serves a capture and plays it at a chosen speed. Starts no relay.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use atproto_relay::devnet::replay::{Capture, DocumentStyle, Replay};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

/// How long to wait for a relay to subscribe to every host.
const SUBSCRIBE_PATIENCE: Duration = Duration::from_secs(3_600);

/// Options of `replay`.
#[derive(Debug, Args)]
pub struct Options {
    /// Folder of the capture: one NAME.frames for each host (a length, 4 bytes, big-endian, and the
    /// frame, repeated) and the audit logs of the accounts in plc/*.audit.json.
    #[arg(value_name = "FOLDER")]
    folder: PathBuf,
    /// How much faster than it was captured; 0 sends everything without a pause.
    #[arg(long, default_value_t = 1.0, value_name = "FACTOR", value_parser = speed)]
    speed: f64,
    /// Write DID documents in the older style (uncompressed keys, `#atproto`).
    #[arg(long)]
    legacy_documents: bool,
    /// End after the last frame instead of serving it until Ctrl-C.
    #[arg(long)]
    exit: bool,
}

fn speed(text: &str) -> Result<f64, String> {
    let factor: f64 = text
        .parse()
        .map_err(|_| "a number, like 10 or 0.5".to_owned())?;
    if factor.is_finite() && factor >= 0.0 {
        Ok(factor)
    } else {
        Err("0 or more".to_owned())
    }
}

/// Serves the capture, waits for a relay, plays.
pub async fn run(options: Options) -> anyhow::Result<()> {
    let capture = Capture::load(&options.folder)?;
    let style = if options.legacy_documents {
        DocumentStyle::Legacy
    } else {
        DocumentStyle::Multikey
    };
    let replay = Replay::start(capture, style)
        .await
        .context("the replay cannot listen on 127.0.0.1")?;
    announce(&replay)?;
    let play = async {
        replay.connected(SUBSCRIBE_PATIENCE).await?;
        play(&replay, options.speed).await;
        if !options.exit {
            eprintln!("everything is sent; serving it until Ctrl-C");
            std::future::pending::<()>().await;
        }
        anyhow::Ok(())
    };
    tokio::select! {
        played = play => played,
        interrupted = tokio::signal::ctrl_c() => interrupted.context("waiting for Ctrl-C"),
    }
}

fn announce(replay: &Replay) -> anyhow::Result<()> {
    let names = replay.capture().hosts.iter().map(|host| host.name.clone());
    let hosts: serde_json::Map<_, _> = names
        .enumerate()
        .map(|(n, name)| (name, json!(replay.host_url(n))))
        .collect();
    let description =
        json!({ "plc": replay.plc_url(), "hosts": hosts, "frames": replay.timeline().len() });
    println!("{}", serde_json::to_string_pretty(&description)?);
    let hosts: String = (0..replay.capture().hosts.len())
        .map(|n| format!(" --host {}", replay.host_url(n)))
        .collect();
    eprintln!("waiting for a relay on every host, for example:");
    eprintln!(
        "  atproto-relay serve --allow-private-hosts --plc-host {}{hosts}",
        replay.plc_url()
    );
    Ok(())
}

async fn play(replay: &Replay, speed: f64) {
    let bar = ProgressBar::new(replay.timeline().len() as u64);
    bar.set_style(
        ProgressStyle::with_template("{wide_bar} {pos}/{len} frames")
            .expect("a constant template parses"),
    );
    let mut last = None;
    for moment in replay.timeline().to_vec() {
        let apart = last
            .replace(moment.time)
            .map_or(0, |last| moment.time.millis().saturating_sub(last.millis()));
        if speed > 0.0 {
            tokio::time::sleep(Duration::from_secs_f64(
                apart.max(0) as f64 / 1_000.0 / speed,
            ))
            .await;
        }
        replay.send_next();
        bar.inc(1);
    }
    bar.finish_and_clear();
}
