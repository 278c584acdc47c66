//! Run configs: any text. One that is accepted is the same after writing and reading, defaults and all.
#![no_main]

use libfuzzer_sys::fuzz_target;
use stickbreak_train::config::RunConfig;

fuzz_target!(|text: &str| {
    let Ok(config) = RunConfig::parse(text, &[]) else { return };
    assert!(config.micro_batch(1) > 0 && config.sequences_per_step().is_multiple_of(config.micro_batch(1)));
    let again = RunConfig::parse(&config.to_toml(), &[]).expect("a resolved config is a config");
    assert_eq!(again, config);
});
