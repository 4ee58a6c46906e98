//! nsid
