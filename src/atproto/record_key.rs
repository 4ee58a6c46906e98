//! record_key
