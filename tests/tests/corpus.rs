//! Runs the fuzz targets on their committed corpora, and on bytes from a fixed generator.

use std::path::Path;

use xenstore_tests::fuzzing::{TARGETS, canary};

/// A reproducible sequence of bytes.
fn generated(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        u8::try_from(state >> 56).expect("a byte is left")
    };
    (0..len).map(|_| next()).collect()
}

// Fails if a committed input, found by a fuzzer or a seed, is handled wrongly.
#[test]
fn committed_inputs_pass() {
    for (name, target) in TARGETS {
        let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz");
        let folders = ["corpus", "server/corpus"].map(|folder| fuzz.join(folder).join(name));
        let dir = folders.iter().find(|dir| dir.is_dir()).unwrap_or(&folders[0]);
        let files = std::fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
        let mut count = 0;
        for file in files {
            target(&std::fs::read(file.unwrap().path()).unwrap());
            count += 1;
        }
        assert!(count > 0, "no corpus for {name}");
    }
}

// Fails if the engine and the model differ, or if the cuts of a stream change its frames.
#[test]
fn generated_inputs_pass() {
    for (name, target) in TARGETS {
        // A program of many guests takes as long as a hundred other programs.
        for seed in 0..if *name == "dear" { 10 } else { 1000 } {
            let data = generated(seed, 600);
            let result = std::panic::catch_unwind(|| target(&data));
            assert!(result.is_ok(), "{name} fails for seed {seed}");
        }
    }
}

// Fails if the comparison does not detect a bug in the commit.
#[test]
fn planted_bug_is_found() {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let found = (0..2000).any(|seed| {
        let data = generated(seed, 600);
        std::panic::catch_unwind(|| canary(&data)).is_err()
    });
    std::panic::set_hook(hook);
    assert!(found);
}
