//! Tells the relay that a part of it panicked, which none ever should: the relay then goes down, and the next start takes
//! the rest from the log and the hosts. Does not catch the panic.

use std::sync::Arc;
use std::thread;

/// What is called with a sentence for the operator. Clones share it.
#[derive(Clone)]
pub struct Alarm(Arc<dyn Fn(String) + Send + Sync>);

impl Alarm {
    /// An alarm that calls `raise`, possibly more than once and from any thread.
    pub fn new(raise: impl Fn(String) + Send + Sync + 'static) -> Self {
        Self(Arc::new(raise))
    }

    /// To be held by the thread or task that is watched, for as long as it works. `what` begins a sentence.
    pub fn watch(&self, what: &'static str) -> Watched {
        Watched {
            alarm: self.clone(),
            what,
        }
    }
}

/// Raises the alarm when a panic drops it.
pub struct Watched {
    alarm: Alarm,
    what: &'static str,
}

impl Drop for Watched {
    fn drop(&mut self) {
        if thread::panicking() {
            (self.alarm.0)(format!(
                "{} panicked; nothing is lost, restart the relay and report the message above",
                self.what
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[test]
    fn a_panic_raises_it_and_an_ordinary_end_does_not() {
        let raised = Arc::new(Mutex::new(Vec::new()));
        let alarm = Alarm::new({
            let raised = raised.clone();
            move |reason| raised.lock().unwrap().push(reason)
        });
        let run = |fails: bool| {
            let watched = alarm.watch("a test");
            thread::spawn(move || {
                let _watched = watched;
                assert!(!fails, "on purpose");
            })
            .join()
        };
        assert!(run(false).is_ok());
        assert!(raised.lock().unwrap().is_empty());
        assert!(run(true).is_err());
        assert!(raised.lock().unwrap()[0].starts_with("a test panicked"));
    }
}
