//! What requests bring: query parameters and JSON bodies, read strictly and refused with a sentence.

use super::error::ApiError;
use crate::atproto::did::Did;
use crate::dial::{Guard, PdsHost};
use crate::store::HostId;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use http::{HeaderMap, StatusCode, Uri, header};
use serde::de::DeserializeOwned;
use std::ops::RangeInclusive;

/// Longest request body. The largest real one is a host name.
pub(super) const MAX_BODY_BYTES: usize = 16 * 1024;

/// The query parameters of a request. Unknown ones are ignored, of repeated ones the first counts.
pub(super) struct Parameters(Vec<(String, String)>);

impl Parameters {
    pub(super) fn of(uri: &Uri) -> Self {
        let query = uri.query().unwrap_or_default();
        Self(
            url::form_urlencoded::parse(query.as_bytes())
                .into_owned()
                .collect(),
        )
    }

    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.0
            .iter()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.as_str())
    }

    fn required(&self, name: &str) -> Result<&str, ApiError> {
        match self.get(name) {
            Some(value) if !value.is_empty() => Ok(value),
            _ => Err(ApiError::invalid(format!(
                "the parameter \"{name}\" is missing"
            ))),
        }
    }

    /// The account a request is about, in its normal form.
    pub(super) fn did(&self) -> Result<Did, ApiError> {
        parse_did(self.required("did")?)
    }

    /// The host a request is about, in lower case.
    pub(super) fn hostname(&self, name: &str) -> Result<String, ApiError> {
        parse_hostname(self.required(name)?)
    }

    /// The length of a page.
    pub(super) fn limit(&self, range: RangeInclusive<u32>, default: u32) -> Result<u32, ApiError> {
        let Some(text) = self.get("limit") else {
            return Ok(default);
        };
        text.parse()
            .ok()
            .filter(|limit| range.contains(limit))
            .ok_or_else(|| {
                ApiError::invalid(format!(
                    "the parameter \"limit\" must be an integer from {} to {}",
                    range.start(),
                    range.end()
                ))
            })
    }

    /// The uid after which a page of accounts begins.
    pub(super) fn account_cursor(&self) -> Result<i64, ApiError> {
        Ok(self.cursor::<i64>()?.unwrap_or(0))
    }

    /// The host after which a page of hosts begins.
    pub(super) fn host_cursor(&self) -> Result<Option<HostId>, ApiError> {
        Ok(self.cursor::<u32>()?.map(HostId))
    }

    fn cursor<N: TryFrom<u64>>(&self) -> Result<Option<N>, ApiError> {
        let Some(text) = self.get("cursor").filter(|text| !text.is_empty()) else {
            return Ok(None);
        };
        let number = text
            .parse::<u64>()
            .ok()
            .and_then(|number| N::try_from(number).ok());
        number.map(Some).ok_or_else(|| {
            ApiError::invalid("the parameter \"cursor\" is not one that this relay gave out")
        })
    }
}

/// Reads a DID in any spelling that names the same account.
pub(super) fn parse_did(text: &str) -> Result<Did, ApiError> {
    Did::normalized(text)
        .map_err(|error| ApiError::invalid(format!("{} is not a DID: {error}", quoted(text))))
}

/// A host, written as a name or a URL, as the store knows it: `host` or `host:port`, lower case.
/// Only known hosts are looked for, so private ones may be named as well.
pub(super) fn parse_hostname(text: &str) -> Result<String, ApiError> {
    PdsHost::parse(text.trim(), &Guard::new(true))
        .map(|host| host.name().to_owned())
        .map_err(|error| ApiError::invalid(error.to_string()))
}

/// A text of a stranger, short enough and safe to be shown.
pub(super) fn quoted(text: &str) -> String {
    const SHOWN: usize = 80;
    let mut shown: String = text.chars().take(SHOWN).collect();
    if shown.len() < text.len() {
        shown.push('…');
    }
    format!("{shown:?}")
}

/// A request's body, as JSON.
pub(super) fn json<T: DeserializeOwned>(
    headers: &HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<T, ApiError> {
    let is_json = headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.split(';').next())
        .is_some_and(|media_type| media_type.trim().eq_ignore_ascii_case("application/json"));
    if !is_json {
        return Err(ApiError::invalid(
            "the request needs a body of the type application/json",
        ));
    }
    let body = body.map_err(|rejection| match rejection.status() {
        StatusCode::PAYLOAD_TOO_LARGE => ApiError::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "PayloadTooLarge",
            format!("the body is longer than {MAX_BODY_BYTES} bytes"),
        ),
        _ => ApiError::invalid("the body could not be read"),
    })?;
    serde_json::from_slice(&body)
        .map_err(|error| ApiError::invalid(format!("the body is not what is expected: {error}")))
}
