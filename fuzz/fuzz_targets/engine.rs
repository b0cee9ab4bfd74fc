//! See `xenstore_tests::fuzzing::engine`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| xenstore_tests::fuzzing::engine(data));
