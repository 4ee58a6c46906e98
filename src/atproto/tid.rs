//! tid
