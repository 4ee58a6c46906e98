//! Tells systemd how the service stands (sd_notify(3)), if it started us. That it does not listen is no reason to stop.

use sd_notify::NotifyState;

/// The start is done; `status` says what the service does.
pub fn ready(status: &str) {
    send(&[NotifyState::Ready, NotifyState::Status(status)]);
}

/// The end has begun.
pub fn stopping() {
    send(&[NotifyState::Stopping, NotifyState::Status("stopping")]);
}

/// The sign of life that `WatchdogSec=` asks for.
pub fn alive() {
    send(&[NotifyState::Watchdog]);
}

fn send(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!(%error, "systemd was not told of a change of state");
    }
}
