//! at_uri
