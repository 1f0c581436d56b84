//! The whole fleet in one executable; it also plays the agent and the coordinator.

use std::process::ExitCode;

fn main() -> ExitCode {
    fleet::cli::main()
}
