//! car
