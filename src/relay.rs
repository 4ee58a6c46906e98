//! The wiring of a whole relay.
