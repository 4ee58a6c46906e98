//! Pings systemd's watchdog (`WatchdogSec=`). Before each ping every part has completed a round since the last ping. An
//! idle part is given a task for that, through the queue that its work comes by.
//!
//! A part that is stuck stops the pings, and systemd ends the relay; nothing here ends it. A part that is blocked by a
//! known cause that is reported elsewhere (a full disk, an unreachable database) is not stuck.

use std::io::{self, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use prometheus::IntGauge;
use tokio::io::AsyncReadExt as _;

use super::notify;
use crate::heartbeat::Heartbeat;

/// Time of the first check after the parts were given a task: most have completed it by then. The interval doubles with
/// each check, up to this share of the period.
const FIRST_CHECK: Duration = Duration::from_millis(1);
const CHECKS_IN_PERIOD: u32 = 20;

/// A part of the relay that must make progress.
pub struct Part {
    /// Its kind; several parts can share one, and have one gauge then.
    pub kind: &'static str,
    /// 1 while a part of this kind shows no progress.
    pub stuck: IntGauge,
    /// Its name in the log.
    pub name: String,
    /// Its rounds.
    pub heartbeat: Heartbeat,
    /// Gives it a task. Never waits.
    pub nudge: Box<dyn Fn() + Send>,
}

impl Part {
    /// The runtime that this is called in: a byte is sent through a socket, so that each beat needs a poll of readiness and
    /// a run of a task.
    ///
    /// # Errors
    /// The system gives no sockets.
    pub fn runtime(stuck: IntGauge) -> io::Result<Part> {
        let (near, far) = UnixStream::pair()?;
        near.set_nonblocking(true)?;
        far.set_nonblocking(true)?;
        let mut far = tokio::net::UnixStream::from_std(far)?;
        let heartbeat = Heartbeat::default();
        let beating = heartbeat.clone();
        tokio::spawn(async move {
            let mut bytes = [0; 16];
            // Ends when the other side is dropped.
            while far.read(&mut bytes).await.is_ok_and(|count| count > 0) {
                beating.beat();
            }
        });
        let nudge = move || {
            // A full socket has enough to read.
            let _ = (&near).write(&[0]);
        };
        Ok(Part {
            kind: "runtime",
            stuck,
            name: "the runtime".into(),
            heartbeat,
            nudge: Box::new(nudge),
        })
    }

    fn is_alive(&self, since: u64) -> bool {
        self.heartbeat.beats() != since || self.heartbeat.is_waiting()
    }
}

/// Watchdog thread: polls each component's heartbeat. Ends when this is dropped.
pub struct Watchdog {
    ending: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Watchdog {
    /// Watches `parts` where systemd asks for it.
    ///
    /// # Errors
    /// The system starts no more threads.
    pub fn start(parts: Vec<Part>) -> io::Result<Option<Watchdog>> {
        sd_notify::watchdog_enabled()
            .map(|period| Watchdog::spawn(period, parts, notify::watchdog))
            .transpose()
    }

    fn spawn(
        period: Duration,
        parts: Vec<Part>,
        ping: impl Fn() + Send + 'static,
    ) -> io::Result<Watchdog> {
        let (ending, ended) = mpsc::channel();
        let round = Round {
            period,
            parts,
            ended,
        };
        let thread = thread::Builder::new()
            .name("watchdog".into())
            .spawn(move || round.run(ping))?;
        Ok(Watchdog {
            ending: Some(ending),
            thread: Some(thread),
        })
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.ending = None;
        if self
            .thread
            .take()
            .is_some_and(|thread| thread.join().is_err())
        {
            tracing::error!("the watchdog panicked");
        }
    }
}

struct Round {
    period: Duration,
    parts: Vec<Part>,
    ended: Receiver<()>,
}

/// The watchdog was dropped.
struct Dropped;

impl Round {
    /// Pings twice in each period, as sd_watchdog_enabled(3) recommends, as long as all parts make progress.
    fn run(&self, ping: impl Fn()) {
        self.show(&[]);
        loop {
            let began = Instant::now();
            if self.until_all_beat().is_err() {
                return;
            }
            ping();
            let left = (self.period / 2).saturating_sub(began.elapsed());
            if self.pause(left).is_err() {
                return;
            }
        }
    }

    /// Gives each part a task, and returns when each has made progress.
    fn until_all_beat(&self) -> Result<(), Dropped> {
        let began = Instant::now();
        let mut open: Vec<(&Part, u64)> = self
            .parts
            .iter()
            .map(|part| (part, part.heartbeat.beats()))
            .collect();
        for part in &self.parts {
            (part.nudge)();
        }
        let mut interval = FIRST_CHECK;
        let mut reported = false;
        loop {
            open.retain(|(part, beats)| !part.is_alive(*beats));
            if open.is_empty() {
                break;
            }
            if !reported && began.elapsed() >= self.period / 2 {
                reported = true;
                self.report(&open);
            }
            self.pause(interval)?;
            interval = (interval * 2).min(self.period / CHECKS_IN_PERIOD);
        }
        if reported {
            tracing::warn!("all parts make progress again; the watchdog is pinged");
            self.show(&[]);
        }
        Ok(())
    }

    fn report(&self, open: &[(&Part, u64)]) {
        let names: Vec<&str> = open.iter().map(|(part, _)| part.name.as_str()).collect();
        tracing::error!(
            seconds = self.period.as_secs_f64() / 2.0,
            "no progress: {}. The watchdog is no longer pinged; systemd ends the relay when WatchdogSec= has passed",
            names.join(", ")
        );
        self.show(open);
    }

    fn show(&self, open: &[(&Part, u64)]) {
        for part in &self.parts {
            let stuck = open.iter().any(|(other, _)| other.kind == part.kind);
            part.stuck.set(i64::from(stuck));
        }
    }

    fn pause(&self, time: Duration) -> Result<(), Dropped> {
        match self.ended.recv_timeout(time) {
            Err(RecvTimeoutError::Timeout) => Ok(()),
            Ok(()) | Err(RecvTimeoutError::Disconnected) => Err(Dropped),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    const PERIOD: Duration = Duration::from_millis(100);
    /// A loaded machine, not a slow program.
    const PATIENCE: Duration = Duration::from_secs(20);

    /// A part that does what it is given while `works`.
    fn part(works: &Arc<AtomicBool>) -> Part {
        let heartbeat = Heartbeat::default();
        let (beating, works) = (heartbeat.clone(), works.clone());
        Part {
            kind: "shards",
            stuck: IntGauge::new("stuck", "of a test").unwrap(),
            name: "a part".into(),
            heartbeat,
            nudge: Box::new(move || {
                if works.load(Ordering::Acquire) {
                    beating.beat();
                }
            }),
        }
    }

    fn watch(parts: Vec<Part>) -> (Watchdog, Receiver<()>) {
        let (pings, pinged) = mpsc::channel();
        // The test may have heard enough.
        let ping = move || pings.send(()).unwrap_or_default();
        (Watchdog::spawn(PERIOD, parts, ping).unwrap(), pinged)
    }

    #[test]
    fn one_stuck_part_of_many_stops_the_pings_until_it_gets_on() {
        let (sound, shaky) = (
            Arc::new(AtomicBool::new(true)),
            Arc::new(AtomicBool::new(true)),
        );
        let ill = part(&shaky);
        let heartbeat = ill.heartbeat.clone();
        let (watchdog, pinged) = watch(vec![part(&sound), ill]);
        for _ in 0..3 {
            pinged.recv_timeout(PATIENCE).unwrap();
        }
        shaky.store(false, Ordering::Release);
        // One ping may be under way.
        let silence = PERIOD * 5;
        let _ = pinged.recv_timeout(silence);
        assert!(
            pinged.recv_timeout(silence).is_err(),
            "a stuck part is no life"
        );
        heartbeat.beat();
        pinged.recv_timeout(PATIENCE).unwrap();
        drop(watchdog);
    }

    #[test]
    fn a_part_that_is_held_up_by_what_is_known_is_alive() {
        let stuck = Arc::new(AtomicBool::new(false));
        let held = part(&stuck);
        let heartbeat = held.heartbeat.clone();
        let (_watchdog, pinged) = watch(vec![held]);
        assert!(pinged.recv_timeout(PERIOD * 3).is_err());
        heartbeat.wait(|| {
            for _ in 0..3 {
                pinged.recv_timeout(PATIENCE).unwrap();
            }
        });
    }

    #[test]
    fn the_runtime_beats_as_long_as_it_turns() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let part = runtime
            .block_on(async { Part::runtime(IntGauge::new("stuck", "of a test").unwrap()) })
            .unwrap();
        let heartbeat = part.heartbeat.clone();
        let (_watchdog, pinged) = watch(vec![part]);
        assert!(pinged.recv_timeout(PERIOD * 3).is_err(), "nobody drives it");
        runtime.block_on(async {
            while heartbeat.beats() < 3 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        });
        pinged.recv_timeout(PATIENCE).unwrap();
    }
}
