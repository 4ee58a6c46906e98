//! The operator's changes as the log tells them: one line each, with who, what, why, and what was before.
//! Promises a line for each that was made or failed; texts of requests stand in it quoted.

use super::auth::Actor;
use super::error::ApiError;
use std::fmt::Display;

/// Longest reason that an operator may give.
const MAX_REASON_CHARS: usize = 1_000;

/// A change by the operator.
pub(super) struct Deed<'a> {
    /// The route's name.
    pub action: &'static str,
    /// The host, account or domain.
    pub subject: &'a str,
    /// The operator's own words.
    pub reason: Option<&'a str>,
    /// What was in force, and what is to be.
    pub previous: String,
    pub new: String,
}

impl Deed<'_> {
    /// Refuses a reason that is too long for the log, before anything is done.
    pub(super) fn checked(self) -> Result<Self, ApiError> {
        let length = self.reason.map_or(0, |reason| reason.chars().count());
        if length > MAX_REASON_CHARS {
            return Err(ApiError::invalid(format!(
                "\"reason\" is longer than {MAX_REASON_CHARS} characters"
            )));
        }
        Ok(self)
    }

    /// Tells what came of it.
    pub(super) fn told<T, E: Display + Into<ApiError>>(
        self,
        actor: &Actor,
        outcome: Result<T, E>,
    ) -> Result<T, ApiError> {
        let Deed {
            action, subject, ..
        } = self;
        let (actor, reason) = (actor.to_string(), self.reason.unwrap_or_default());
        let (previous, new) = (self.previous, self.new);
        match outcome {
            Ok(done) => {
                tracing::info!(
                    actor,
                    action,
                    subject,
                    reason,
                    previous,
                    new,
                    "the operator changed something"
                );
                Ok(done)
            }
            Err(error) => {
                let failure = error.to_string();
                tracing::info!(
                    actor,
                    action,
                    subject,
                    reason,
                    previous,
                    new,
                    failure,
                    "a change of the operator failed"
                );
                Err(error.into())
            }
        }
    }
}
