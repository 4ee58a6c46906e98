//! cid
