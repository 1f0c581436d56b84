//! `edge-agent doctor`: tries each part on its own and says in plain words how it is.

use std::{path::Path, time::Duration};

use models::{Bundle, Engine, self_test};

use crate::{
    capture::{self, Shot, SourceConfig},
    clock::WallClock,
    config::Config,
    connection::{self, Connection, News},
    identity::{self, Tls},
    outbox,
    samples::{self, SamplesConfig},
    seal::Seal,
    update,
};

/// A broker that takes longer is too slow to be of use.
const BROKER_PATIENCE: Duration = Duration::from_secs(8);
/// This was written in 2026: an earlier date means that the clock was never set.
const YEAR_2026_MS: i64 = 1_767_225_600_000;
/// No device of ours runs in 2100 with a correct clock today.
const YEAR_2100_MS: i64 = 4_102_444_800_000;

type Finding = Result<String, String>;

/// How readings and samples lie on the disk.
fn storage(config: &Config) -> Finding {
    let looked = Seal::look(config.storage.key_file.as_deref(), &config.data);
    let (seal, _) = looked.map_err(|error| error.to_string())?;
    Ok(if seal.is_on() {
        "readings, samples and the private key are encrypted".into()
    } else {
        "readings, samples and the private key are not encrypted; storage.key_file does that".into()
    })
}

/// Tries everything, prints a line for each, and says how many are sick.
pub(crate) async fn examine(config: &Config) -> usize {
    let mut sick = 0;
    let mut say = |what: &str, finding: Finding| match finding {
        Ok(fine) => println!("ok    {what}: {fine}"),
        Err(wrong) => {
            sick += 1;
            println!("FAIL  {what}: {wrong}");
        }
    };
    say("device", Ok(format!("{}/{}", config.site, config.device)));
    say("disk", disk(&config.data, still_wanted(config)));
    say("storage", storage(config));
    say("clock", clock(WallClock::system().now_ms()));
    let (finding, tls) = identity::doctor(config);
    say("identity", finding);
    if config.source.is_empty() {
        say("source", Err("none is configured; add a [[source]]".into()));
    }
    for source_config in &config.source {
        say(
            &format!("source {}", source_config.name),
            source(source_config),
        );
    }
    say("model", model(config.model.bundle.as_deref()));
    say(
        "board",
        crate::board::Board::try_pins(&config.board).map_err(|error| error.to_string()),
    );
    say("broker", broker(config, &tls).await);
    let (samples, with) = (config.samples.clone(), tls.clone());
    let finding = tokio::task::spawn_blocking(move || samples_go(&samples, &with)).await;
    say(
        "samples",
        finding.unwrap_or_else(|_| Err("they could not be tried".into())),
    );
    let (copy, what) = (config.clone(), "updates");
    let finding = tokio::task::spawn_blocking(move || update::doctor(&copy, &tls)).await;
    say(
        what,
        finding.unwrap_or_else(|_| Err("they could not be tried".into())),
    );
    if sick == 0 {
        println!("everything works");
    } else {
        println!("{sick} thing(s) to mend");
    }
    sick
}

/// What outbox and samples may take beyond what they have taken already.
fn still_wanted(config: &Config) -> u64 {
    let more = |most: u64, folder: &str| {
        most.saturating_sub(outbox::directory_bytes(&config.data.join(folder)))
    };
    let samples = config.samples.enabled.then_some(config.samples.max_bytes);
    let samples = samples.map_or(0, |most| more(most, "samples"));
    more(config.outbox.max_bytes, "outbox").saturating_add(samples)
}

fn disk(data: &Path, wanted: u64) -> Finding {
    let shown = data.display();
    std::fs::create_dir_all(data).map_err(|error| {
        format!("{shown} cannot be made: {error}; choose another folder with `data`, or its owner")
    })?;
    let probe = data.join(".doctor");
    std::fs::write(&probe, b"doctor")
        .and_then(|()| std::fs::File::open(&probe)?.sync_all())
        .and_then(|()| std::fs::remove_file(&probe))
        .map_err(|error| format!("{shown} cannot be written: {error}"))?;
    let space = rustix::fs::statvfs(data).map_err(|error| format!("{shown}: {error}"))?;
    let free = space.f_bavail.saturating_mul(space.f_frsize);
    let mib = |bytes: u64| bytes / (1024 * 1024);
    if free < wanted {
        return Err(format!(
            "{shown} has {} MiB free, outbox and samples may take {} MiB more: free some space or lower outbox.max_bytes or \
             samples.max_bytes",
            mib(free),
            mib(wanted)
        ));
    }
    Ok(format!("{shown} is writable, {} MiB free", mib(free)))
}

fn clock(now_ms: i64) -> Finding {
    if (YEAR_2026_MS..YEAR_2100_MS).contains(&now_ms) {
        Ok("set".into())
    } else {
        Err(
            "not set (readings will carry a wrong time, none is lost): is there a network for NTP?"
                .into(),
        )
    }
}

fn source(config: &SourceConfig) -> Finding {
    let mut source =
        capture::open(config, update::Wanted::default()).map_err(|error| error.to_string())?;
    match source.shoot(0) {
        Shot::Picture { picture, file, .. } => {
            let from = file.map(|f| format!(" from {f}")).unwrap_or_default();
            Ok(format!(
                "a frame of {}×{} pixels{from}",
                picture.width(),
                picture.height()
            ))
        }
        Shot::Bad { why } => Err(format!("its first frame cannot be used: {why}")),
        Shot::End => Err("it has no frame".into()),
    }
}

fn model(path: Option<&Path>) -> Finding {
    let path = path.ok_or("none is configured; set model.bundle to a bundle's folder")?;
    let bundle = Bundle::open(path).map_err(|error| error.to_string())?;
    let engine = Engine::load(&bundle).map_err(|error| error.to_string())?;
    let test = self_test(&bundle, &engine);
    if test.passed() {
        Ok(format!("{}, self-test passed", engine.id()))
    } else {
        Err(format!("self-test failed\n{test}"))
    }
}

fn samples_go(config: &SamplesConfig, tls: &Tls) -> Finding {
    match &config.coordinator {
        _ if !config.enabled => Ok("none are kept (samples.enabled is false)".into()),
        Some(url) => samples::probe(url, tls),
        None => Ok(format!(
            "up to {} MiB stay on the device (samples.coordinator is not set)",
            config.max_bytes / (1024 * 1024)
        )),
    }
}

async fn broker(config: &Config, tls: &Tls) -> Finding {
    let url = &connection::shown(config, tls);
    let by_certificate = config.broker.is_tls() && config.broker.user.is_none();
    if by_certificate && outbox::is_in_use(&config.data.join("outbox")) {
        let (config, tls) = (config.clone(), tls.clone());
        let tried = tokio::task::spawn_blocking(move || connection::handshake(&config, &tls));
        let tried = tried.await.map_err(|error| error.to_string())?;
        return match tried {
            Ok(()) => Ok(format!(
                "{url} answers and takes the device's certificate; MQTT was not tried, it would disconnect the running agent"
            )),
            Err(why) => Err(format!("{url}: {why}; see also identity")),
        };
    }
    let mut connection = Connection::probe(config, tls).map_err(|error| error.to_string())?;
    let answer = async {
        loop {
            match connection.news().await {
                News::Up => return Ok(format!("{url} answers")),
                News::Lost { why, doubt: true } => {
                    return Err(format!("{url}: {why}; see also identity"));
                }
                News::Lost { why, .. } => {
                    return Err(format!(
                        "{url}: {why}; is it running, and is the address right?"
                    ));
                }
                _ => {}
            }
        }
    };
    let finding = tokio::time::timeout(BROKER_PATIENCE, answer).await;
    let finding =
        finding.unwrap_or_else(|_| Err(format!("{url} accepts connections but does not answer")));
    connection.close(Duration::from_secs(1)).await;
    finding
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_was_never_set_is_noticed() {
        assert!(clock(0).is_err() && clock(i64::MAX).is_err());
        assert!(clock(YEAR_2026_MS + 1).is_ok());
    }

    fn samples_reach(config: &SamplesConfig) -> Finding {
        samples_go(config, &Tls::none())
    }

    #[test]
    fn it_says_where_samples_go() {
        let with = |text: &str| samples_reach(&toml::from_str(text).unwrap());
        assert!(with("enabled = false").unwrap().contains("none are kept"));
        assert!(with("").unwrap().contains("100 MiB stay on the device"));
        let nobody = with("coordinator = 'http://127.0.0.1:9'").unwrap_err();
        assert!(nobody.contains("wait on the device"), "{nobody}");
    }

    /// What lies in the outbox is room that it needs no more: a device with a full outbox has no trouble with its disk.
    #[test]
    fn what_is_taken_already_is_not_wanted_again() {
        let folder = tempfile::tempdir().unwrap();
        let data = folder.path();
        let text = format!("device = 'd1'\ndata = {data:?}\n[samples]\nmax_bytes = 16777216");
        let config = Config::parse(&text).unwrap();
        let all = config.outbox.max_bytes + 16_777_216;
        assert_eq!(still_wanted(&config), all);
        let taken = 3 << 20;
        for part in ["outbox", "samples"] {
            std::fs::create_dir(data.join(part)).unwrap();
            std::fs::write(data.join(part).join("full"), vec![1; taken]).unwrap();
        }
        let wanted = still_wanted(&config);
        assert!((1..=all - 2 * taken as u64).contains(&wanted), "{wanted}");
    }

    #[test]
    fn a_disk_is_tried_not_believed() {
        let folder = tempfile::tempdir().unwrap();
        assert!(disk(folder.path(), 1).is_ok());
        assert!(
            disk(folder.path(), u64::MAX)
                .unwrap_err()
                .contains("lower outbox.max_bytes")
        );
        let file = folder.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert!(disk(&file.join("below"), 1).is_err());
    }
}
