//! Every rule by table: a case that breaks this rule and no other, beside a good case that breaks none.
//! Looks no further than one event and one account; the whole relay is tested over sockets.

mod judge;
mod rules;
mod sample;
mod shard;

use crate::hosts::Rule;

/// Rules that are not applied by `rules` and `judge`: the connection to a host applies the first three
/// (`tests/it/upstream.rs`), the shard the others.
const APPLIED_ELSEWHERE: [Rule; 5] = [
    Rule::FrameFields,
    Rule::UpstreamSeq,
    Rule::DidSyntax,
    Rule::Edit,
    Rule::HostBanned,
];

#[test]
fn every_rule_has_a_case_that_breaks_it() {
    let tested = rules::COMMITS
        .iter()
        .map(|case| case.rule)
        .chain(rules::SYNCS.iter().map(|case| case.rule))
        .chain(judge::REFUSED.iter().map(|case| case.rule))
        .chain(APPLIED_ELSEWHERE);
    let tested: std::collections::HashSet<Rule> = tested.collect();
    let untested: Vec<Rule> = Rule::ALL
        .into_iter()
        .filter(|rule| !tested.contains(rule))
        .collect();
    assert_eq!(untested, []);
}
