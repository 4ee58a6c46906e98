//! Tells systemd how the service stands (sd_notify(3)), if it started us. That it does not listen is no reason to stop.

use std::time::Duration;

use sd_notify::NotifyState;

/// How often a recovery is looked at, and how much time it is given from then on if it got on.
const RECOVERY_LOOK: Duration = Duration::from_secs(1);
const RECOVERY_MICROS: u32 = 30_000_000;

/// Whether systemd listens.
pub fn is_heard() -> bool {
    std::env::var_os("NOTIFY_SOCKET").is_some()
}

/// The start is done; `status` says what the service does.
pub fn ready(status: &str) {
    send(&[NotifyState::Ready, NotifyState::Status(status)]);
}

/// What the service does now, in a line for a person.
pub fn status(status: &str) {
    send(&[NotifyState::Status(status)]);
}

/// The configuration is being read again; [`ready`] ends that. `Type=notify-reload` wants the time with it.
pub fn reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => send(&[
            NotifyState::Reloading,
            now,
            NotifyState::Status("reading the configuration again"),
        ]),
        Err(error) => {
            tracing::warn!(%error, "there is no monotonic clock to tell systemd the time of a reload")
        }
    }
}

/// The end has begun.
pub fn stopping() {
    send(&[NotifyState::Stopping, NotifyState::Status("stopping")]);
}

/// Asks for more time (`TimeoutStartSec=`) while a long recovery gets on, and no longer: `steps` are those done so far.
/// To be given up when the start is over.
pub async fn ask_for_time(steps: impl Fn() -> u64) {
    let mut done = steps();
    while is_heard() {
        tokio::time::sleep(RECOVERY_LOOK).await;
        let now = steps();
        if now > done {
            send(&[
                NotifyState::ExtendTimeoutUsec(RECOVERY_MICROS),
                NotifyState::Status(&format!("recovering, {now} steps done")),
            ]);
        }
        done = now;
    }
}

/// The sign of life that `WatchdogSec=` asks for.
pub(super) fn alive() {
    send(&[NotifyState::Watchdog]);
}

fn send(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!(%error, "systemd was not told of a change of state");
    }
}
