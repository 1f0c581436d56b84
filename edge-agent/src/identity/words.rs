//! The device's identity in plain words: for `doctor`, for `enrol`.

use std::process::ExitCode;

use mesh_core::enrolment::Trouble;

use super::{Keeper, Tls, disk::Disk};
use crate::{clock::WallClock, config::Config};

const DAY_MS: i64 = 24 * 3_600_000;

/// A moment for people, in UTC.
pub(crate) fn date(ms: i64) -> String {
    match jiff::Timestamp::from_second(ms.div_euclid(1_000)) {
        Ok(moment) => moment.to_string(),
        Err(_) => "an unknown time".into(),
    }
}

/// What `edge-agent doctor` says of the identity, and what it connects with to try the rest.
pub(crate) fn doctor(config: &Config) -> (Result<String, String>, Tls) {
    let opened = Disk::open(config).and_then(|disk| Ok((disk.key()?, disk)));
    let (key, disk) = match opened {
        Ok(opened) => opened,
        Err(error) => return (Err(error.to_string()), Tls::none()),
    };
    let Some(identity) = &config.identity else {
        let words = "none: the device speaks in the clear, and anybody can pose as it. Set coordinator.token to an \
                     enrolment token of the coordinator";
        return (Ok(words.into()), Tls::none());
    };
    let Some(key) = key else {
        let words = match identity.token {
            Some(_) => {
                "not enrolled yet: the key is made and the token used when the agent starts, or by `edge-agent enrol`"
            }
            None => "there is no private key and no enrolment token: set coordinator.token",
        };
        return (Err(words.into()), Tls::none());
    };
    let stored = disk.stored(&key);
    drop(key);
    let tls = match Keeper::open(config, WallClock::system()) {
        Ok(keeper) => keeper.as_ref().map_or_else(Tls::none, Keeper::tls),
        Err(error) => return (Err(error.to_string()), Tls::none()),
    };
    let Some(stored) = stored else {
        let words = match &identity.token {
            Some(token) => format!(
                "the private key is there and private, but there is no certificate yet: {} has not given one. Is it \
                 running, is the token good (it expires {}), has a person to approve? `edge-agent enrol` says more",
                identity.url,
                date(token.claims().exp.saturating_mul(1_000))
            ),
            None => "the private key is there, but neither a certificate nor an enrolment token: set coordinator.token"
                .into(),
        };
        return (Err(words), tls);
    };
    let (notes, validity) = (&stored.notes, stored.validity);
    let now_ms = WallClock::system().now_ms().max(notes.floor_ms);
    let words = format!(
        "key there and private; enrolled as {}/{} at {}; certificate valid until {}, renewed from {} on; authority {} is the \
         only one trusted; it is later than {} for certain",
        notes.site,
        notes.device,
        identity.url,
        date(validity.not_after_ms),
        date(validity.renew_after_ms),
        models::digest_of(&stored.chain.ca),
        date(notes.floor_ms),
    );
    if let Some(why) = &notes.refused {
        let words = format!(
            "{words}. The coordinator gives it no further certificate: {why}. The device stays out until it is let in again: \
             set coordinator.token to a new token, with which it enrols with a new key by itself"
        );
        return (Err(words), tls);
    }
    if now_ms < validity.not_after_ms {
        return (Ok(words), tls);
    }
    let days = now_ms.saturating_sub(validity.not_after_ms) / DAY_MS;
    let words = format!(
        "{words}. By this device's clock it expired {days} day(s) ago: the running agent renews it with its key as soon as \
         the coordinator answers, unless it was revoked there"
    );
    (Err(words), tls)
}

/// `edge-agent enrol`: asks once, and says what happened.
pub(crate) fn enrol(config: &Config) -> anyhow::Result<ExitCode> {
    let Some(identity) = &config.identity else {
        anyhow::bail!("there is no enrolment token: give --token, or set coordinator.token");
    };
    let Some(mut keeper) = Keeper::open(config, WallClock::system())? else {
        anyhow::bail!("there is no identity to enrol");
    };
    let who = format!("{}/{}", config.site, config.device);
    println!("asking {} for a certificate for {who}", identity.url);
    let Some(answer) = keeper.ask_now() else {
        let until = keeper
            .certificate()
            .map_or_else(|| "?".into(), |c| date(c.not_after_ms));
        println!("the device is enrolled already, with a certificate that is valid until {until}");
        return Ok(ExitCode::SUCCESS);
    };
    let _ = keeper.answered(answer);
    match (keeper.trouble(), keeper.certificate()) {
        (None, Some(certificate)) => {
            let until = date(certificate.not_after_ms);
            println!("enrolled as {who}; the certificate is valid until {until} and renews itself");
            Ok(ExitCode::SUCCESS)
        }
        (Some(Trouble::Pending), _) => {
            println!(
                "a person has to approve this device at the coordinator first; the agent goes on asking when it runs"
            );
            Ok(ExitCode::SUCCESS)
        }
        (Some(Trouble::Refused(why)), _) => {
            println!("the coordinator refuses: {why}");
            Ok(ExitCode::FAILURE)
        }
        (Some(Trouble::Failed(why)), _) => {
            println!("it did not work: {why}");
            Ok(ExitCode::FAILURE)
        }
        (None, None) => {
            println!("there is nothing to ask with: give --token, or set coordinator.token");
            Ok(ExitCode::FAILURE)
        }
    }
}
