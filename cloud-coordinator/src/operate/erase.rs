//! `erase …`

use anyhow::bail;
use axum::http::Method;
use clap::Subcommand;
use serde_json::{Value, json};

use super::{Where, each, text};

/// Erasing samples.
#[derive(Subcommand)]
pub(crate) enum EraseCommand {
    /// Erases one sample, and whatever has the same image.
    Sample {
        /// Its number.
        id: i64,
        /// Why; it stays in the receipt.
        #[arg(long)]
        why: String,
    },
    /// Erases what a device has sent and what it still has.
    ///
    /// Example: cloud-coordinator erase device plant-3/cam-7 --from 1767225600000 --why "people were in the picture"
    Device {
        /// `SITE/DEVICE`, with `_` where no site was proved.
        device: String,
        /// Only what was captured from this moment on, in milliseconds since 1970.
        #[arg(long, value_name = "MS", allow_negative_numbers = true)]
        from: Option<i64>,
        /// Only what was captured up to this moment, in milliseconds since 1970.
        #[arg(long, value_name = "MS", allow_negative_numbers = true)]
        to: Option<i64>,
        /// Why; it stays in the receipt.
        #[arg(long)]
        why: String,
    },
    /// Erases what a person has brought in.
    Person {
        /// As named when it was imported.
        name: String,
        /// Why; it stays in the receipt.
        #[arg(long)]
        why: String,
    },
    /// Shows the receipts, or one.
    Status {
        /// Its number.
        id: Option<i64>,
    },
}

fn show(one: &Value) {
    let receipt = &one["receipt"];
    let when = |key: &str| {
        one[key]
            .as_i64()
            .map_or("not yet".into(), |ms| format!("at {ms}"))
    };
    let names = |value: &Value| {
        let names: Vec<&str> = each(value).filter_map(Value::as_str).collect();
        if names.is_empty() {
            "none".to_owned()
        } else {
            names.join(", ")
        }
    };
    println!(
        "erasure {}: {} ({}), asked for by {} at {}",
        one["id"],
        one["which"],
        text(one, "why"),
        text(one, "author"),
        one["asked_ms"]
    );
    println!(
        "    gone: {} samples, {} images, {} uploads, {} labels, {} embeddings; named in {} datasets, which keep digests",
        receipt["samples"],
        receipt["images"],
        receipt["uploads"],
        receipt["labels"],
        receipt["embeddings"],
        receipt["datasets"]
    );
    println!(
        "    from this coordinator {}, everywhere {}",
        when("here_ms"),
        when("done_ms")
    );
    println!(
        "    devices that have answered: {}; awaited: {}",
        names(&one["answered"]),
        names(&one["awaited"])
    );
    if each(&receipt["models"]).next().is_some() {
        println!(
            "    still in the golden pictures of: {} (train anew from another model, and remove these)",
            names(&receipt["models"])
        );
    }
}

/// Does what `erase …` asks for.
pub(crate) async fn erase(place: &Where, command: EraseCommand) -> anyhow::Result<()> {
    let (which, why) = match command {
        EraseCommand::Sample { id, why } => (json!({ "sample": id }), why),
        EraseCommand::Person { name, why } => (json!({ "person": name }), why),
        EraseCommand::Device {
            device,
            from,
            to,
            why,
        } => {
            if device.split('/').count() != 2 {
                bail!("{device:?} is not SITE/DEVICE");
            }
            let which = json!({ "device": { "name": device, "from_ms": from, "to_ms": to } });
            (which, why)
        }
        EraseCommand::Status { id: Some(id) } => {
            show(
                &place
                    .ask(Method::GET, &format!("/erasures/{id}"), None)
                    .await?,
            );
            return Ok(());
        }
        EraseCommand::Status { id: None } => {
            let all = place.ask(Method::GET, "/erasures", None).await?;
            each(&all).for_each(show);
            return Ok(());
        }
    };
    let body = json!({ "which": which, "why": why });
    show(&place.ask(Method::POST, "/erasures", Some(body)).await?);
    Ok(())
}
