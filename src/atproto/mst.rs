//! mst
