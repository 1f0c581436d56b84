//! A mosquitto of our own: on a free port, without persistence, so that it forgets everything when it ends.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::Path,
    time::Duration,
};

use tokio::net::TcpStream;

use crate::{
    dice::Dice,
    process::{Process, Program},
};

/// Where Debian and others put it; it is often not on a user's path.
const PLACES: [&str; 3] = [
    "/usr/sbin/mosquitto",
    "/usr/bin/mosquitto",
    "/usr/local/sbin/mosquitto",
];
/// Ports that the kernel does not hand out by itself (its range starts at 32768): a server that was killed
/// finds its port free when it comes back.
const PORTS: std::ops::Range<u16> = 15_000..32_000;

/// A free port on loopback, and the next one, that stay free while their server restarts.
///
/// # Errors
/// If none is found.
pub fn free_port() -> io::Result<SocketAddr> {
    let mut dice = Dice::new(Dice::seed());
    for _ in 0..1_000 {
        let offset = u16::try_from(dice.below(PORTS.len())).unwrap_or(0);
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, PORTS.start + offset));
        let next = SocketAddr::from((Ipv4Addr::LOCALHOST, address.port() + LISTENERS));
        if TcpListener::bind(address).is_ok() && TcpListener::bind(next).is_ok() {
            return Ok(address);
        }
    }
    Err(io::ErrorKind::AddrInUse.into())
}

/// Is mosquitto installed?
#[must_use]
pub fn mosquitto() -> Option<&'static str> {
    PLACES.into_iter().find(|place| Path::new(place).exists())
}

/// Describes a mosquitto that listens on `address` and keeps nothing. Its files go to `dir`.
///
/// # Errors
/// If it is not installed or its configuration cannot be written.
pub fn forgetful(guard: &Program, dir: &Path, address: SocketAddr) -> io::Result<Process> {
    let program = installed()?;
    let config = dir.join("mosquitto.conf");
    // The queue holds what its one subscriber has not taken yet; 0 is no bound, since the fleet's load is
    // bounded by what is unacknowledged.
    let text = format!(
        "listener {} {}\nallow_anonymous true\npersistence false\nmax_queued_messages 0\nlog_type error\nlog_type warning\n",
        address.port(),
        address.ip()
    );
    std::fs::write(&config, text)?;
    let command = [program.into(), "-c".into(), config.into_os_string()];
    Ok(Process::other(
        "mosquitto",
        guard,
        command,
        dir.join("mosquitto.log"),
    ))
}

/// The folder below a site's root where the coordinator writes what a broker needs.
pub(crate) const RULES: &str = "broker";
/// Who listens comes in by the next port.
pub(crate) const LISTENERS: u16 = 1;

/// What a coordinator at `root` is told about a broker that listens on `address` with its rules.
pub(crate) fn guarded_config(root: &Path, address: SocketAddr) -> String {
    let (rules, pid) = (root.join(RULES), pid_file(root));
    format!(
        "[broker]\nurl = \"mqtts://{address}\"\nrules_for = \"mosquitto\"\nrules = {rules:?}\n\
         reload = [\"/bin/sh\", \"-c\", \"test ! -e '{pid}' || kill -HUP $(cat '{pid}')\"]\n",
        pid = pid.display()
    )
}

fn pid_file(root: &Path) -> std::path::PathBuf {
    root.join("mosquitto.pid")
}

/// Describes a mosquitto with the rules that the coordinator at `root` wrote; it keeps nothing either.
///
/// # Errors
/// If it is not installed or its configuration cannot be written.
pub(crate) fn guarded(guard: &Program, root: &Path, log: &Path) -> io::Result<Process> {
    let program = installed()?;
    let config = root.join("mosquitto.conf");
    // A mosquitto of root's gives its rights up, and could not read its own key then.
    let text = format!(
        "user root\npid_file {}\npersistence false\nmax_queued_messages 0\nlog_type error\nlog_type warning\n\
         include_dir {}\n",
        pid_file(root).display(),
        root.join(RULES).display(),
    );
    std::fs::write(&config, text)?;
    let command = [program.into(), "-c".into(), config.into_os_string()];
    Ok(Process::other(
        "mosquitto",
        guard,
        command,
        log.join("mosquitto.log"),
    ))
}

/// Notes a listener's password for that mosquitto, as an operator does.
pub(crate) fn set_password(root: &Path, name: &str, password: &str) -> io::Result<()> {
    let output = std::process::Command::new("mosquitto_passwd")
        .arg("-b")
        .arg(root.join(RULES).join("passwords"))
        .args([name, password])
        .output()?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    Err(io::Error::other(format!("mosquitto_passwd: {said}")))
}

fn installed() -> io::Result<&'static str> {
    let missing = "mosquitto is not installed (Debian: apt-get install mosquitto)";
    mosquitto().ok_or_else(|| io::Error::other(missing))
}

/// Waits until something accepts connections at `address`.
pub async fn answers(address: SocketAddr, bound: Duration) -> bool {
    let until = tokio::time::Instant::now() + bound;
    while tokio::time::Instant::now() < until {
        if TcpStream::connect(address).await.is_ok() {
            return true;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_ports_that_the_kernel_does_not_give_away() {
        for _ in 0..20 {
            assert!(PORTS.contains(&free_port().unwrap().port()));
        }
    }
}
