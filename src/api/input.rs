//! What requests bring: query parameters and JSON bodies, read strictly and refused with a sentence.

use super::error::ApiError;
use crate::atproto::did::Did;
use crate::dial::{Guard, HostName};
use crate::store::HostId;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use http::{HeaderMap, StatusCode, Uri, header};
use serde::de::{DeserializeOwned, Deserializer, Error as _, Visitor, value};
use serde::forward_to_deserialize_any;
use serde_json::{Map, Value};
use std::ops::RangeInclusive;

/// How similar a known name must be to an unknown one to be suggested for it (Jaro-Winkler).
const SIMILAR: f64 = 0.75;

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
    HostName::parse(text.trim(), &Guard::new(true))
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
    serde_json::from_slice(&json_bytes(headers, body)?).map_err(unexpected)
}

/// The same for an operator's body, of a type that refuses unknown fields: names the known one that is meant.
pub(super) fn operator_json<T: DeserializeOwned>(
    headers: &HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<T, ApiError> {
    let body = json_bytes(headers, body)?;
    serde_json::from_slice(&body).map_err(|error| {
        let known = fields::<T>();
        let given = serde_json::from_slice::<Map<String, Value>>(&body).unwrap_or_default();
        let unknown = given.keys().find(|name| !known.contains(&name.as_str()));
        let Some(unknown) = unknown else {
            return unexpected(error);
        };
        let hint = match nearest(unknown, known.iter().copied()) {
            Some(meant) => format!("did you mean \"{meant}\"?"),
            None => format!("known are {}", known.join(", ")),
        };
        ApiError::invalid(format!("unknown field {}; {hint}", quoted(unknown)))
    })
}

/// The name most like this one, if any is like it.
pub(crate) fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    known
        .map(|k| (strsim::jaro_winkler(name, k), k))
        .filter(|(likeness, _)| *likeness >= SIMILAR)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, k)| k)
}

fn unexpected(error: serde_json::Error) -> ApiError {
    ApiError::invalid(format!("the body is not what is expected: {error}"))
}

/// The names of a type's fields.
fn fields<T: DeserializeOwned>() -> &'static [&'static str] {
    let mut names: &[&str] = &[];
    // Stops at the names.
    let _ = T::deserialize(Fields(&mut names));
    names
}

/// Takes the names of the fields that a type asks for, and has nothing to give.
struct Fields<'a>(&'a mut &'static [&'static str]);

impl<'de> Deserializer<'de> for Fields<'_> {
    type Error = value::Error;

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, value::Error> {
        *self.0 = fields;
        self.deserialize_any(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, value::Error> {
        visitor.visit_some(self)
    }

    fn deserialize_any<V: Visitor<'de>>(self, _visitor: V) -> Result<V::Value, value::Error> {
        Err(value::Error::custom("there is no value"))
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 u8 u16 u32 u64 f32 f64 char str string bytes byte_buf unit unit_struct newtype_struct seq
        tuple tuple_struct map enum identifier ignored_any
    }
}

/// The bytes of a body that says it is JSON.
fn json_bytes(headers: &HeaderMap, body: Result<Bytes, BytesRejection>) -> Result<Bytes, ApiError> {
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
    read(body)
}

/// A body's bytes.
pub(super) fn read(body: Result<Bytes, BytesRejection>) -> Result<Bytes, ApiError> {
    body.map_err(|rejection| match rejection.status() {
        StatusCode::PAYLOAD_TOO_LARGE => ApiError::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "PayloadTooLarge",
            format!("the body is longer than {MAX_BODY_BYTES} bytes"),
        ),
        _ => ApiError::invalid("the body could not be read"),
    })
}
