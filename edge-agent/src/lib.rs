//! The device: capture → gate → preprocess → infer → decide → outbox → uplink.
//!
//! [`Agent::start`] wires it all; start reading there.

mod about;
mod agent;
pub mod board;
mod cameras;
pub mod capture;
pub mod cli;
pub mod clock;
pub mod config;
mod connection;
pub mod counters;
mod dice;
mod doctor;
pub mod drift;
#[doc(hidden)]
pub mod fuzzed;
pub mod gate;
mod http;
pub mod identity;
pub mod mesh;
pub mod offload;
pub mod outbox;
mod passage;
mod pipeline;
pub mod samples;
pub mod seal;
pub mod settings;
pub mod store;
mod trouble;
pub mod update;
mod uplink;

pub use agent::{Agent, AgentError, AgentHandle};
