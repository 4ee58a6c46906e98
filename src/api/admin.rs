//! The operator's routes, with the paths and JSON of the reference relay (cmd/relay), so that its
//! tools work here. Who may come in is decided in `auth`.

use super::State;
use super::auth::Actor;
use super::deeds::Deed;
use super::error::ApiError;
use super::input::{Parameters, operator_json, parse_did, parse_hostname, quoted, read};
use super::operations::{HostActivity, OperationError};
use super::sync::current;
use crate::atproto::datetime;
use crate::atproto::did::Did;
use crate::dial::is_dns_name;
use crate::discovery::Requester;
use crate::firehose::ConsumerInfo;
use crate::store::{HostRow, HostStatus, LocalStatus, RateOverrides, Validation};
use axum::body::Bytes;
use axum::extract::State as Extract;
use axum::extract::rejection::BytesRejection;
use axum::{Extension, Json};
use http::{HeaderMap, StatusCode, Uri};
use serde::{Deserialize, Deserializer, Serialize};
use std::time::UNIX_EPOCH;

/// Accounts of one page of the takedown list (the reference relay's).
const TAKEDOWNS_PAGE: u32 = 500;

/// What the reference relay answers to every change: the word, not the value.
#[derive(Serialize)]
pub(super) struct Success {
    success: &'static str,
}

const SUCCESS: Json<Success> = Json(Success { success: "true" });

type Changed = Result<Json<Success>, ApiError>;

impl From<OperationError> for ApiError {
    fn from(error: OperationError) -> Self {
        match error {
            OperationError::UnknownAccount => Self::repo_not_found(error.to_string()),
            OperationError::ShuttingDown => Self::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "ShuttingDown",
                error.to_string(),
            ),
            OperationError::Store(error) => error.into(),
        }
    }
}

/// A rate limit as the reference relay shows it. -1: not known, the host is not connected.
#[derive(Serialize)]
struct Rate {
    #[serde(rename = "Max")]
    max: f64,
    #[serde(rename = "Window")]
    window_seconds: f64,
}

/// A host as the reference relay shows it.
#[derive(Serialize)]
pub(super) struct HostInfo {
    #[serde(rename = "ID")]
    id: u32,
    #[serde(rename = "CreatedAt")]
    created_at: String,
    #[serde(rename = "Host")]
    host: String,
    #[serde(rename = "SSL")]
    ssl: bool,
    /// -1: none yet.
    #[serde(rename = "Cursor")]
    cursor: i64,
    #[serde(rename = "Registered")]
    registered: bool,
    #[serde(rename = "Blocked")]
    blocked: bool,
    #[serde(rename = "Status")]
    status: &'static str,
    #[serde(rename = "Trusted")]
    trusted: bool,
    #[serde(rename = "Validation")]
    validation: Option<&'static str>,
    #[serde(rename = "RepoCount")]
    repo_count: i64,
    #[serde(rename = "RepoLimit")]
    repo_limit: i64,
    #[serde(rename = "HasActiveConnection")]
    has_active_connection: bool,
    #[serde(rename = "EventsSeenSinceStartup")]
    events_seen_since_startup: u64,
    #[serde(rename = "PerSecondEventRate")]
    per_second: Rate,
    #[serde(rename = "PerHourEventRate")]
    per_hour: Rate,
    #[serde(rename = "PerDayEventRate")]
    per_day: Rate,
    /// Of this relay alone.
    #[serde(rename = "PerHourByteRate")]
    bytes_per_hour: Rate,
    #[serde(rename = "UserCount")]
    user_count: i64,
}

impl HostInfo {
    fn of(row: HostRow, activity: Option<HostActivity>) -> Self {
        let connected = activity.filter(|activity| activity.connected);
        let rate = |max: fn(HostActivity) -> f64, window_seconds| Rate {
            max: connected.map_or(-1.0, max),
            window_seconds,
        };
        Self {
            id: row.id.0,
            created_at: datetime::format_utc(
                u64::try_from(row.created_at).unwrap_or(0) * 1_000_000,
            ),
            host: row.hostname,
            ssl: row.tls,
            cursor: row.cursor.unwrap_or(-1),
            registered: row.status == HostStatus::Active,
            blocked: row.status == HostStatus::Banned,
            status: row.status.as_str(),
            trusted: row.trusted,
            validation: row.validation.map(Validation::as_str),
            repo_count: row.account_count,
            repo_limit: row.account_limit,
            has_active_connection: connected.is_some(),
            events_seen_since_startup: activity.map_or(0, |activity| activity.events),
            per_second: rate(|activity| activity.per_second, 1.0),
            per_hour: rate(|activity| activity.per_hour, 3_600.0),
            per_day: rate(|activity| activity.per_day, 86_400.0),
            bytes_per_hour: rate(|activity| activity.bytes_per_hour, 3_600.0),
            user_count: row.account_count,
        }
    }
}

/// `GET /admin/pds/list`: all hosts, the oldest first.
pub(super) async fn list_hosts(
    Extract(state): Extract<State>,
) -> Result<Json<Vec<HostInfo>>, ApiError> {
    let rows = state.store.hosts().await?;
    let info = |row: HostRow| {
        let activity = state.operations.activity(row.id);
        HostInfo::of(current(&state, row), activity)
    };
    Ok(Json(rows.into_iter().map(info).collect()))
}

/// Where a host stood before a change.
fn status_of(host: Option<&HostRow>) -> String {
    host.map_or("unknown", |host| host.status.as_str()).into()
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct HostName {
    hostname: String,
    reason: Option<String>,
}

/// `POST /admin/pds/requestCrawl`: as the public method, without its limits.
pub(super) async fn request_crawl(
    Extract(state): Extract<State>,
    Extension(actor): Extension<Actor>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Changed {
    let request: HostName = operator_json(&headers, body)?;
    let known = match parse_hostname(&request.hostname) {
        Ok(name) => state.store.host_by_name(&name).await?,
        Err(_) => None,
    };
    let deed = Deed {
        action: "pds/requestCrawl",
        subject: &request.hostname,
        reason: request.reason.as_deref(),
        previous: status_of(known.as_ref()),
        new: "requested".into(),
    };
    let deed = deed.checked()?;
    let crawl = state
        .operations
        .request_crawl(&request.hostname, Requester::Operator);
    deed.told(&actor, crawl.await)?;
    Ok(SUCCESS)
}

/// What may be said of a change that needs no body.
#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct Remark {
    reason: Option<String>,
}

impl Remark {
    fn of(headers: &HeaderMap, body: Result<Bytes, BytesRejection>) -> Result<Remark, ApiError> {
        let body = read(body)?;
        if body.is_empty() {
            return Ok(Remark::default());
        }
        let remark: Option<Remark> = operator_json(headers, Ok(body))?;
        Ok(remark.unwrap_or_default())
    }
}

/// `POST /admin/pds/block?host=…`.
pub(super) async fn block_host(
    Extract(state): Extract<State>,
    Extension(actor): Extension<Actor>,
    uri: Uri,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Changed {
    let host = known_host(&state, &Parameters::of(&uri).hostname("host")?).await?;
    let remark = Remark::of(&headers, body)?;
    let deed = standing(&host, &remark, "pds/block", HostStatus::Banned).checked()?;
    deed.told(&actor, state.operations.ban_host(host.id).await)?;
    Ok(SUCCESS)
}

/// `POST /admin/pds/unblock?host=…`.
pub(super) async fn unblock_host(
    Extract(state): Extract<State>,
    Extension(actor): Extension<Actor>,
    uri: Uri,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Changed {
    let host = known_host(&state, &Parameters::of(&uri).hostname("host")?).await?;
    let remark = Remark::of(&headers, body)?;
    let deed = standing(&host, &remark, "pds/unblock", HostStatus::Active).checked()?;
    deed.told(&actor, state.operations.unban_host(host.id).await)?;
    Ok(SUCCESS)
}

fn standing<'a>(
    host: &'a HostRow,
    remark: &'a Remark,
    action: &'static str,
    new: HostStatus,
) -> Deed<'a> {
    Deed {
        action,
        subject: &host.hostname,
        reason: remark.reason.as_deref(),
        previous: status_of(Some(host)),
        new: new.as_str().into(),
    }
}

/// A change of limits. What is absent stays; `null` puts the host under the general rule again.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct LimitChange {
    host: String,
    reason: Option<String>,
    repo_limit: Option<i64>,
    #[serde(default, deserialize_with = "present")]
    per_second: Option<Option<u32>>,
    #[serde(default, deserialize_with = "present")]
    per_hour: Option<Option<u32>>,
    #[serde(default, deserialize_with = "present")]
    per_day: Option<Option<u32>>,
    #[serde(default, deserialize_with = "present")]
    bytes_per_hour: Option<Option<u64>>,
    #[serde(default, deserialize_with = "present")]
    validation: Option<Option<String>>,
}

/// Tells a field that is `null` from one that is absent.
fn present<'de, D: Deserializer<'de>, T: Deserialize<'de>>(from: D) -> Result<Option<T>, D::Error> {
    T::deserialize(from).map(Some)
}

impl LimitChange {
    /// The host's rates after the change, if it names any.
    fn rates(&self, now: RateOverrides) -> Option<RateOverrides> {
        let named = self.per_second.is_some()
            || self.per_hour.is_some()
            || self.per_day.is_some()
            || self.bytes_per_hour.is_some();
        named.then(|| RateOverrides {
            per_second: self.per_second.unwrap_or(now.per_second),
            per_hour: self.per_hour.unwrap_or(now.per_hour),
            per_day: self.per_day.unwrap_or(now.per_day),
            bytes_per_hour: self.bytes_per_hour.unwrap_or(now.bytes_per_hour),
        })
    }

    /// What it changes at a host, for the log: what was, and what is to be.
    fn told(&self, host: &HostRow, mode: Option<Option<Validation>>) -> [String; 2] {
        let general = |value: Option<u64>| value.map_or("general".into(), |it| it.to_string());
        let word = |mode: Option<Validation>| mode.map_or("general", Validation::as_str).to_owned();
        let limit = |name, before, after: Option<Option<u64>>| {
            after.map(|after| (name, general(before), general(after)))
        };
        let events = |name, before: Option<u32>, after: Option<Option<u32>>| {
            let after = after.map(|after| after.map(u64::from));
            limit(name, before.map(u64::from), after)
        };
        let RateOverrides {
            per_second,
            per_hour,
            per_day,
            bytes_per_hour,
        } = host.rates;
        let accounts = host.account_limit.to_string();
        let changes = [
            (self.repo_limit).map(|new| ("repo_limit", accounts, new.to_string())),
            events("per_second", per_second, self.per_second),
            events("per_hour", per_hour, self.per_hour),
            events("per_day", per_day, self.per_day),
            limit("bytes_per_hour", bytes_per_hour, self.bytes_per_hour),
            mode.map(|new| ("validation", word(host.validation), word(new))),
        ];
        let mut told = [Vec::new(), Vec::new()];
        for (name, before, after) in changes.into_iter().flatten() {
            told[0].push(format!("{name}={before}"));
            told[1].push(format!("{name}={after}"));
        }
        told.map(|words| words.join(" "))
    }

    fn validation(&self) -> Result<Option<Option<Validation>>, ApiError> {
        match &self.validation {
            None => Ok(None),
            Some(None) => Ok(Some(None)),
            Some(Some(word)) => Validation::parse(word)
                .map(|mode| Some(Some(mode)))
                .ok_or_else(|| {
                    ApiError::invalid(format!(
                        "{} is no validation mode: strict, ratchet or lenient",
                        quoted(word)
                    ))
                }),
        }
    }
}

/// `POST /admin/pds/changeLimits`.
pub(super) async fn change_limits(
    Extract(state): Extract<State>,
    Extension(actor): Extension<Actor>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Changed {
    let change: LimitChange = operator_json(&headers, body)?;
    let hostname = parse_hostname(&change.host)?;
    let validation = change.validation()?;
    if change.repo_limit.is_some_and(|limit| limit < 0) {
        return Err(ApiError::invalid("\"repo_limit\" must not be negative"));
    }
    let host = known_host(&state, &hostname).await?;
    let rates = change.rates(host.rates);
    if change.repo_limit.is_none() && rates.is_none() && validation.is_none() {
        return Err(ApiError::invalid(
            "nothing to change: give \"repo_limit\", \"per_second\", \"per_hour\", \"per_day\", \"bytes_per_hour\" or \"validation\"",
        ));
    }
    let [previous, new] = change.told(&host, validation);
    let deed = Deed {
        action: "pds/changeLimits",
        subject: &host.hostname,
        reason: change.reason.as_deref(),
        previous,
        new,
    };
    let deed = deed.checked()?;
    let changed = async {
        if let Some(rates) = rates {
            state.operations.set_rates(host.id, rates).await?;
        }
        if let Some(mode) = validation {
            state.operations.set_validation(host.id, mode).await?;
        }
        if let Some(limit) = change.repo_limit {
            state.operations.set_account_limit(host.id, limit).await?;
        }
        Ok::<(), OperationError>(())
    };
    deed.told(&actor, changed.await)?;
    Ok(SUCCESS)
}

async fn known_host(state: &State, hostname: &str) -> Result<HostRow, ApiError> {
    let row = state.store.host_by_name(hostname).await?;
    row.ok_or_else(|| {
        ApiError::host_not_found(format!("the host {} is not known here", quoted(hostname)))
    })
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AccountName {
    did: String,
    reason: Option<String>,
}

/// `POST /admin/repo/takeDown`.
pub(super) async fn take_down(
    Extract(state): Extract<State>,
    Extension(actor): Extension<Actor>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Changed {
    let name: AccountName = operator_json(&headers, body)?;
    let did = parse_did(&name.did)?;
    let before = local_status(&state, &did).await?;
    let deed = Deed {
        action: "repo/takeDown",
        subject: did.as_str(),
        reason: name.reason.as_deref(),
        previous: local_word(before),
        new: LocalStatus::TakenDown.as_str().into(),
    };
    let deed = deed.checked()?;
    deed.told(&actor, state.operations.take_down(did.clone()).await)?;
    Ok(SUCCESS)
}

/// `POST /admin/repo/reverseTakedown`.
pub(super) async fn reverse_takedown(
    Extract(state): Extract<State>,
    Extension(actor): Extension<Actor>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Changed {
    let name: AccountName = operator_json(&headers, body)?;
    let did = parse_did(&name.did)?;
    let before = local_status(&state, &did).await?;
    let after = match before {
        Some(LocalStatus::TakenDown) => Some(LocalStatus::Active),
        // Another status stays.
        other => other,
    };
    let deed = Deed {
        action: "repo/reverseTakedown",
        subject: did.as_str(),
        reason: name.reason.as_deref(),
        previous: local_word(before),
        new: local_word(after),
    };
    let deed = deed.checked()?;
    let reversed = state.operations.reverse_takedown(did.clone());
    deed.told(&actor, reversed.await)?;
    Ok(SUCCESS)
}

async fn local_status(state: &State, did: &Did) -> Result<Option<LocalStatus>, ApiError> {
    let row = state.store.account(did).await?;
    Ok(row.map(|row| row.local))
}

fn local_word(status: Option<LocalStatus>) -> String {
    status.map_or("unknown", LocalStatus::as_str).into()
}

#[derive(Serialize)]
pub(super) struct Takedowns {
    dids: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cursor: Option<i64>,
}

/// `GET /admin/repo/takedowns`.
pub(super) async fn list_takedowns(
    Extract(state): Extract<State>,
    uri: Uri,
) -> Result<Json<Takedowns>, ApiError> {
    let after = Parameters::of(&uri).account_cursor()?;
    let page = state.store.list_taken_down(after, TAKEDOWNS_PAGE).await?;
    let dids = page.rows.into_iter().map(|row| row.did.to_string());
    Ok(Json(Takedowns {
        cursor: page.next,
        dids: dids.collect(),
    }))
}

#[derive(Serialize)]
pub(super) struct BannedDomains {
    banned_domains: Vec<String>,
}

/// `GET /admin/subs/listDomainBans`.
pub(super) async fn list_domain_bans(
    Extract(state): Extract<State>,
) -> Result<Json<BannedDomains>, ApiError> {
    Ok(Json(BannedDomains {
        banned_domains: state.store.domain_bans().await?,
    }))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct DomainName {
    #[serde(alias = "Domain")]
    domain: String,
    reason: Option<String>,
}

/// `POST /admin/subs/banDomain`.
pub(super) async fn ban_domain(
    Extract(state): Extract<State>,
    Extension(actor): Extension<Actor>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Changed {
    let name: DomainName = operator_json(&headers, body)?;
    let domain = name.normal()?;
    let deed = name.deed("subs/banDomain", &domain, &state, BANNED).await?;
    deed.told(&actor, state.operations.ban_domain(&domain).await)?;
    Ok(SUCCESS)
}

/// `POST /admin/subs/unbanDomain`.
pub(super) async fn unban_domain(
    Extract(state): Extract<State>,
    Extension(actor): Extension<Actor>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Changed {
    let name: DomainName = operator_json(&headers, body)?;
    let domain = name.normal()?;
    let deed = name
        .deed("subs/unbanDomain", &domain, &state, NOT_BANNED)
        .await?;
    deed.told(&actor, state.operations.unban_domain(&domain).await)?;
    Ok(SUCCESS)
}

/// What the log says of a domain.
const BANNED: &str = "banned";
const NOT_BANNED: &str = "not banned";

impl DomainName {
    async fn deed<'a>(
        &'a self,
        action: &'static str,
        domain: &'a str,
        state: &State,
        new: &str,
    ) -> Result<Deed<'a>, ApiError> {
        let banned = state.store.domain_bans().await?;
        let is_banned = banned.iter().any(|one| one == domain);
        let deed = Deed {
            action,
            subject: domain,
            reason: self.reason.as_deref(),
            previous: if is_banned { BANNED } else { NOT_BANNED }.into(),
            new: new.into(),
        };
        deed.checked()
    }

    /// The domain of a ban, in lower case: `example.com`, also written `*.example.com`, or a whole
    /// top-level domain.
    fn normal(&self) -> Result<String, ApiError> {
        let domain = self
            .domain
            .trim()
            .trim_start_matches("*.")
            .trim_end_matches('.')
            .to_ascii_lowercase();
        if !is_dns_name(&domain) {
            return Err(ApiError::invalid(format!(
                "{} is not a domain",
                quoted(&self.domain)
            )));
        }
        Ok(domain)
    }
}

/// A consumer as the reference relay shows it, and what it was sent.
#[derive(Serialize)]
pub(super) struct Consumer {
    id: u64,
    remote_addr: String,
    user_agent: String,
    events_consumed: u64,
    connected_at: String,
    bytes_sent: u64,
    cursor: u64,
}

impl From<ConsumerInfo> for Consumer {
    fn from(info: ConsumerInfo) -> Self {
        let connected_at = info
            .connected_at
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_micros() as u64);
        Self {
            id: info.id,
            remote_addr: info.remote_addr.to_string(),
            user_agent: info.user_agent,
            events_consumed: info.events,
            connected_at: datetime::format_utc(connected_at),
            bytes_sent: info.bytes,
            cursor: info.position,
        }
    }
}

/// `GET /admin/consumers/list`.
pub(super) async fn list_consumers(Extract(state): Extract<State>) -> Json<Vec<Consumer>> {
    Json(
        state
            .operations
            .consumers()
            .into_iter()
            .map(Consumer::from)
            .collect(),
    )
}
