//! Views of the event log: what is kept up to date from its events and can be made again from them, as far as the log
//! reaches. Each view follows the log from a position of its own, which is stored together with the changes of the events
//! before it. Does not know who sends events; the log knows only how far each view is.

pub mod accounts;
mod follower;
mod purge;

use std::future::Future;

use crate::eventlog::{EventLog, ReadError, Slot};

pub use follower::{Batch, Event, FellOut, Follower, MAX_BYTES, MAX_EVENTS, Step};
pub use purge::Purge;

/// What follows the log.
///
/// A unit of work is any number of [`View::apply`] and [`View::purge`], in the order of the log, and the
/// [`View::commit`] that ends it. What a crash takes before its commit comes again.
pub trait View {
    /// Why a view fails.
    type Error;

    /// Its name in the table of positions and in the metrics.
    const NAME: &'static str;

    /// Applies events. Of those that were redacted or lost, only the entry is left.
    fn apply(&mut self, events: &[Event<'_>]) -> impl Future<Output = Result<(), Self::Error>>;

    /// Forgets what an account's events up to [`Purge::up_to`] brought.
    fn purge(&mut self, purge: Purge) -> impl Future<Output = Result<(), Self::Error>>;

    /// Stores, in one transaction, what was applied and purged since the last commit, and a position: `next`, or a lower
    /// one where the view needs to see events again. Returns the position.
    fn commit(&mut self, next: u64) -> impl Future<Output = Result<u64, Self::Error>>;

    /// The log no longer has events that the view has not seen: it warns, makes itself anew, or fails.
    fn fell_out(&mut self, gap: FellOut) -> impl Future<Output = Result<(), Self::Error>>;
}

/// Why a view does not follow the log.
#[derive(Debug, thiserror::Error)]
pub enum FollowError<E> {
    /// The log.
    #[error("the event log cannot be read: {0}")]
    Log(#[from] ReadError),
    /// The view.
    #[error(transparent)]
    View(E),
}

/// Brings a view from `position` up to the head of the log.
///
/// # Errors
/// The log cannot be read, or the view fails.
pub async fn catch_up<V: View>(
    view: &mut V,
    log: &EventLog,
    position: u64,
    slot: &Slot,
) -> Result<(), FollowError<V::Error>> {
    let mut follower = Follower::new(log.clone(), position);
    while let Some(step) = follower.read().await? {
        apply_step(view, step, slot)
            .await
            .map_err(FollowError::View)?;
    }
    Ok(())
}

/// Gives a view one step of its follower, and confirms to the log's retention what the view has stored.
///
/// # Errors
/// The view's.
pub async fn apply_step<V: View>(view: &mut V, step: Step, slot: &Slot) -> Result<(), V::Error> {
    let batch = match step {
        Step::Events(batch) => batch,
        Step::FellOut(gap) => return view.fell_out(gap).await,
    };
    let events = batch.events();
    let mut rest = events.as_slice();
    while let Some((at, purge)) = first_purge(rest) {
        let (until, behind) = rest.split_at(at + 1);
        view.apply(until).await?;
        view.purge(purge).await?;
        rest = behind;
    }
    if !rest.is_empty() {
        view.apply(rest).await?;
    }
    let position = view.commit(batch.next()).await?;
    debug_assert!(
        position <= batch.next(),
        "nothing is stored that was not given"
    );
    slot.confirm(position);
    Ok(())
}

/// The first event that ends an account.
fn first_purge(events: &[Event<'_>]) -> Option<(usize, Purge)> {
    let purges = events.iter().map(Purge::of).enumerate();
    purges.filter_map(|(at, purge)| Some((at, purge?))).next()
}
