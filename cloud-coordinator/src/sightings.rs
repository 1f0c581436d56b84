//! Tells subscribers once what several cameras of a site have seen.
//!
//! ```text
//!  readings, as they were stored ──> sightings (site, label, time) ──a moment later──> lacewing/v1/<site>/_/_/sighting
//! ```
//!
//! It reads what ingest has committed, by a cursor that is committed with what it finds: a coordinator that dies goes on where it was.
//! A reading that is stored once counts once. What is said may be said again after a crash, with the same id.

use std::{sync::Arc, time::Duration};

use mesh_core::{Kind, MAX_WITNESSES, Sighting, Topic, VERSION, Witness};
use tokio_util::sync::CancellationToken;

use crate::{
    clock,
    config::SightingsConfig,
    ingest::Link,
    store::{Same, SightingRow, Store, StoreError},
};

/// Between two looks.
const EVERY: Duration = Duration::from_millis(250);
/// A database that does not answer is left alone for this long.
const AGAIN: Duration = Duration::from_secs(5);

/// Works until `stop`; at once over where no label is to be looked for.
pub(crate) async fn run(
    store: Arc<Store>,
    link: Link,
    config: SightingsConfig,
    stop: CancellationToken,
) {
    if config.labels.is_empty() {
        return;
    }
    loop {
        let pause = match round(&store, &link, &config).await {
            Ok(true) => Duration::ZERO,
            Ok(false) => EVERY,
            Err(error) => {
                tracing::warn!(%error, "sightings are looked for later");
                AGAIN
            }
        };
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
    }
}

/// True if there is more to look at.
async fn round(store: &Store, link: &Link, config: &SightingsConfig) -> Result<bool, StoreError> {
    let now_ms = clock::now_ms();
    let window_ms = i64::try_from(config.window_ms).unwrap_or(i64::MAX);
    let same = Same {
        labels: &config.labels,
        min_score: config.min_score,
        window_ms,
    };
    let is_more = store.sight(same, now_ms).await?;
    for row in store.to_say(now_ms.saturating_sub(window_ms)).await? {
        let Some((topic, bytes)) = message(&row) else {
            // It cannot be said, today or ever.
            store.said(&row.id).await?;
            continue;
        };
        if !link.stands() || !link.tell(&topic, bytes).await {
            break;
        }
        store.said(&row.id).await?;
    }
    Ok(is_more)
}

fn message(row: &SightingRow) -> Option<(Topic, Vec<u8>)> {
    let witnesses = row.witnesses.iter().take(MAX_WITNESSES).map(|seen| {
        Some(Witness {
            device: seen.device.parse().ok()?,
            source: seen.source.parse().ok()?,
            ts: seen.ts,
            score: seen.score as f32,
            readings: u32::try_from(seen.readings).unwrap_or(u32::MAX),
            epoch: seen.epoch.cast_unsigned(),
            seq: seen.seq.cast_unsigned(),
        })
    });
    let sighting = Sighting {
        v: VERSION,
        id: row.id.clone(),
        label: row.label.clone(),
        from: row.from_ms,
        to: row.to_ms,
        witnesses: witnesses.collect::<Option<_>>()?,
    };
    let topic = Topic::of_site(&row.site.parse().ok()?, Kind::Sighting);
    Some((topic, sighting.encode().ok()?))
}
