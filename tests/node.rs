//! The executable that the tests start as agent, as coordinator and as guard.

fn main() -> std::process::ExitCode {
    fleet::cli::main()
}
