//! The coordinator's program: everything is in the library, see [`cloud_coordinator::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    cloud_coordinator::cli::main(std::env::args_os())
}
