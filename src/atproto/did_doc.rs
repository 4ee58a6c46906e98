//! did_doc
