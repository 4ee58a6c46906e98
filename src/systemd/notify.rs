//! Reports the state of the service to systemd (sd_notify(3)), if systemd started it. A report that fails is logged, and
//! stops nothing.

use std::time::Duration;

use sd_notify::NotifyState;

/// Interval of the checks of a recovery, and the time that it is given from each check on if it made progress.
const RECOVERY_CHECK: Duration = Duration::from_secs(1);
const RECOVERY_MICROS: u32 = 30_000_000;

/// Whether systemd started the service, and takes reports.
pub fn is_enabled() -> bool {
    std::env::var_os("NOTIFY_SOCKET").is_some()
}

/// The start is complete; `status` describes what the service does.
pub fn ready(status: &str) {
    send(&[NotifyState::Ready, NotifyState::Status(status)]);
}

/// The status line: what the service does now.
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
            tracing::warn!(%error, "no monotonic clock: a reload cannot be reported to systemd")
        }
    }
}

/// The shutdown has begun.
pub fn stopping() {
    send(&[NotifyState::Stopping, NotifyState::Status("stopping")]);
}

/// Asks for more time (`TimeoutStartSec=`) while a long recovery makes progress, and no longer: `steps` counts the steps
/// done so far. Drop it when the start is complete.
pub async fn ask_for_time(steps: impl Fn() -> u64) {
    let mut done = steps();
    while is_enabled() {
        tokio::time::sleep(RECOVERY_CHECK).await;
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

/// The heartbeat that `WatchdogSec=` requires.
pub(super) fn watchdog() {
    send(&[NotifyState::Watchdog]);
}

fn send(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!(%error, "a change of state was not reported to systemd");
    }
}
