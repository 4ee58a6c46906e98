//! How often a relay is killed or restarted, for tests that can do so more often than usual.

use std::env;
use std::fmt::Debug;
use std::str::FromStr;

/// What `ATPROTO_KILLS` says, or `otherwise`.
pub fn kills<N: FromStr<Err: Debug>>(otherwise: N) -> N {
    let kills = env::var("ATPROTO_KILLS").ok();
    kills.map_or(otherwise, |kills| {
        kills.parse().expect("ATPROTO_KILLS is a number")
    })
}
