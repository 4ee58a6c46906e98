//! Who may be dialled.
