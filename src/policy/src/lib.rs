//! The Wasm host: loads policy plugins and asks them for verdicts.
