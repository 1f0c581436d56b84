//! A whole fleet on one machine: a real coordinator, real agents, and a network between them that can be
//! cut, slowed and made to lose answers. The demo, the benchmarks and the end-to-end tests stand on it.

pub mod abuse;
pub mod agent_file;
mod api;
mod bench;
pub mod broker;
pub mod chaos;
pub mod cli;
mod delivery;
mod demo;
pub mod dice;
mod learning;
mod lesson;
mod neighbour;
pub mod net;
pub mod process;
mod report;
mod screen;
pub mod site;
pub mod way;
pub mod witness;
