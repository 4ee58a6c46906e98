//! The yardstick: CPU time of one libsecp256k1 verification, measured in small portions all through
//! a run, so that it meets the same noise as what is measured with it.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use secp256k1::{Message, PublicKey, SecretKey, ecdsa};

/// Verifications in one portion: about 4 ms.
const PORTION: u32 = 128;
/// Pause between two portions: the yardstick takes 2 % of one core.
const PAUSE: Duration = Duration::from_millis(200);

/// A running measurement.
pub struct Yardstick {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Duration>,
}

impl Yardstick {
    /// Starts to measure on a thread of its own.
    pub fn start() -> Yardstick {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || measure(&stopped));
        Yardstick { stop, thread }
    }

    /// Ends the measurement: CPU time of one verification.
    pub fn stop(self) -> Duration {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.thread().unpark();
        self.thread.join().expect("verifying does not panic")
    }
}

fn measure(stop: &AtomicBool) -> Duration {
    let secret = SecretKey::from_secret_bytes([7; 32]).expect("below the order of the curve");
    let public = PublicKey::from_secret_key(&secret);
    let digest = *b"this takes the place of a digest";
    let signature = ecdsa::sign(Message::from_digest(digest), &secret);
    let before = thread_time();
    let mut verified = 0;
    loop {
        for _ in 0..PORTION {
            let verdict = ecdsa::verify(
                std::hint::black_box(&signature),
                Message::from_digest(digest),
                &public,
            );
            assert!(std::hint::black_box(verdict).is_ok());
        }
        verified += PORTION;
        if stop.load(Ordering::Relaxed) {
            // All the thread ever did is to verify and to wait.
            return thread_time().saturating_sub(before) / verified;
        }
        std::thread::park_timeout(PAUSE);
    }
}

/// CPU time of this thread; where the kernel does not tell (other than Linux), the time on the wall.
fn thread_time() -> Duration {
    // The kernel brings the figure up to date when the thread gives up its core.
    std::thread::sleep(Duration::from_millis(1));
    let told = fs::read_to_string("/proc/thread-self/schedstat").ok();
    let nanos = told
        .as_deref()
        .and_then(|text| text.split_ascii_whitespace().next()?.parse().ok());
    nanos.map_or_else(wall, Duration::from_nanos)
}

fn wall() -> Duration {
    static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    START.get_or_init(Instant::now).elapsed()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verification_takes_some_microseconds() {
        let one = Yardstick::start().stop();
        assert!(
            (Duration::from_micros(5)..Duration::from_millis(5)).contains(&one),
            "{one:?}"
        );
    }
}
