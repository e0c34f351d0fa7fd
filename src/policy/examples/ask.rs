//! Asks a bundle what it says of a request, prints the decision as JSON, and how long it took.
//!
//!     cargo run --release -p casemate-policy --example ask -- policies/default.toml src/policy/examples/request.json \
//!         target/compiler/x86_64-unknown-linux-gnu/release/casemate-policy-compiler [TIMES]

use std::{
    error::Error,
    path::Path,
    time::{Duration, Instant},
};

use casemate_policy::{Config, Engine, Request};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let (bundle, request, compiler, times) = match arguments.as_slice() {
        [bundle, request, compiler] => (bundle, request, compiler, 1),
        [bundle, request, compiler, times] => (bundle, request, compiler, times.parse()?),
        _ => return Err("usage: ask BUNDLE REQUEST.json COMPILER [TIMES]".into()),
    };
    let request: Request = serde_json::from_str(&std::fs::read_to_string(request)?)?;
    let cache = Path::new("target/policy-cache");
    let config = Config { bundle: Path::new(bundle), cache, compiler: Path::new(compiler) };
    let start = Instant::now();
    let engine = Engine::open(config)?;
    eprintln!("opened in {:?}", start.elapsed());
    for plugin in engine.plugins() {
        eprintln!(
            "{} {}: {}; compiled: {:?}",
            plugin.name, plugin.version, plugin.summary, plugin.compile_time
        );
    }
    let decision = engine.admit(&request)?;
    println!("{}", serde_json::to_string_pretty(&decision)?);
    for refusal in decision.refusals() {
        eprintln!("{refusal}");
    }
    if times > 1 {
        let mut elapsed = (0..times)
            .map(|_| Ok(engine.admit(&request)?.elapsed))
            .collect::<Result<Vec<Duration>, Box<dyn Error>>>()?;
        elapsed.sort();
        let at = |share: usize| elapsed.get((times - 1) * share / 100).copied().unwrap_or_default();
        eprintln!("{times} times: p50 {:?}, p99 {:?}, worst {:?}", at(50), at(99), at(100));
    }
    Ok(())
}
