#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| atproto_relay_fuzz::identity::check(bytes));
