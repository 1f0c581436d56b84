//! The demo's second story: the lamps over the belts age, the devices notice, somebody labels what they send, and a
//! better model is trained and proved.

use std::{path::Path, time::Duration};

use anyhow::Context;
use serde_json::{Value, json};
use tokio::{
    sync::mpsc::Sender,
    task::spawn_blocking,
    time::{Instant, sleep},
};

use crate::{api::Api, dice::Dice, site::Ageing};

/// When the lamps begin to fail: the plug is in again, and its backlog has arrived.
const ONSET: Duration = Duration::from_secs(38);
/// … and how long it takes until they are as dark as they get.
const RAMP: Duration = Duration::from_secs(8);
/// So dark that the model is often wrong, and that what it sees can still be told apart.
const LIGHT: f32 = 0.7;
/// A bad day: enough faults of each kind to learn from within minutes.
const DEFECT_RATE: f32 = 0.5;
/// Frames that are kept: more than anyone would label.
const KEPT: f64 = 1.0;
/// Twenty seconds of a camera.
const WINDOW: u32 = 100;
/// Labels of the holdout, drawn by lot from what was seen since the light is bad …
const HOLDOUT: usize = 200;
/// … and those to learn from, in the order of the queue. The training starts by itself when they are there.
const LABELS: usize = 300;
/// A class may lose so much of its recall: an old model that sees scratches everywhere in the dark finds every
/// scratch, and no honest model does.
const CLASS_LOSS: f64 = 0.15;
/// Labels in a row, so that one sees them come in.
const AT_ONCE: usize = 10;
const BREATH: Duration = Duration::from_millis(500);
/// How long the story may take, beyond what the demo takes anyway.
const PATIENCE: Duration = Duration::from_secs(240);
/// Between two looks.
const LOOK: Duration = Duration::from_secs(1);
/// A shorter demo has no time for it.
pub(crate) const LEAST: Duration = Duration::from_secs(150);

/// What the cameras see, at this rate.
pub(crate) fn ageing(fps: f64) -> Ageing {
    let frames = |time: Duration| (time.as_secs_f64() * fps).ceil() as u64;
    Ageing {
        light: LIGHT,
        onset: frames(ONSET),
        ramp: frames(RAMP),
        defect_rate: DEFECT_RATE,
        kept: KEPT,
        window: WINDOW,
    }
}

/// The coordinator's configuration: the model in use is known to it, and enough labels start a training.
pub(crate) fn coordinator_config(bundle: &Path) -> String {
    format!(
        "[training]\nmodels = [{bundle:?}]\n[training.policy]\nmax_class_loss = {CLASS_LOSS}\n\
         [training.start]\nlabels = {LABELS}\nbalanced = true\n",
        bundle = bundle.display().to_string()
    )
}

/// Tells the story. What happens is said through `say`.
///
/// # Errors
/// If the coordinator does not do its part in time.
pub(crate) async fn tell(api: Api, bundle: &Path, say: Sender<String>) -> anyhow::Result<()> {
    let start = Instant::now();
    let bundle = models::Bundle::open(bundle)?;
    let task = bundle.manifest.name.clone();
    let classes = bundle.manifest.output.labels.clone();
    let story = Story {
        api,
        task,
        say,
        until: start + PATIENCE,
    };
    tokio::time::sleep_until(start + ONSET).await;
    story
        .says("the lamps over the belts begin to fail: watch how many answers are right".into())
        .await;
    let signs = story
        .until_some("no device sees drift", drift)
        .await
        .context("waiting for drift")?;
    story
        .says(format!("drift is noticed and named: {signs}"))
        .await;
    story
        .ask(move |api, task| {
            api.put(&format!("/tasks/{task}"), &json!({ "classes": classes }))
                .map(drop)
        })
        .await?;
    // Everything that arrived until now may be from better times.
    let since = story.ask(|api, task| newest(&api, &task)).await?;
    let held = story.hold_out(since).await?;
    story
        .says(format!(
            "somebody labels: {held} images by lot, which are only ever measured with"
        ))
        .await;
    let labelled = story.label().await?;
    story
        .says(format!(
            "… and {labelled} that the queue puts first: a training starts by itself"
        ))
        .await;
    let model = story
        .until_some("no training came to its end", trained)
        .await
        .context("waiting for the training")?;
    let model = story
        .ask(move |api, _| api.get(&format!("/catalog/{model}")))
        .await?;
    story.says(verdict(&model)).await;
    Ok(())
}

/// In a sentence.
fn verdict(model: &Value) -> String {
    let share = |value: &Value| value.as_f64().unwrap_or_default() * 100.0;
    let report = &model["report"];
    let name = |key: &str| model[key].as_str().unwrap_or("?").to_owned();
    let what = format!(
        "{} {} answers {:.1} % of the held-out images right, the model in use {:.1} %",
        name("name"),
        name("version"),
        share(&report["accuracy"]),
        share(&report["current_accuracy"]),
    );
    if model["verdict"]["pass"] == json!(true) {
        return format!("{what}: better beyond chance, the gate is open");
    }
    let reasons = model["verdict"]["reasons"].as_array();
    let failed = reasons
        .into_iter()
        .flatten()
        .find(|r| r["pass"] == json!(false));
    let why = failed.and_then(|r| r["text"].as_str()).unwrap_or("?");
    format!("{what}; the gate stays closed: {why}")
}

struct Story {
    api: Api,
    task: String,
    say: Sender<String>,
    until: Instant,
}

impl Story {
    async fn says(&self, what: String) {
        // Nobody listens any more: the demo ends.
        let _ = self.say.send(what).await;
    }

    async fn ask<T: Send + 'static>(
        &self,
        work: impl FnOnce(Api, String) -> anyhow::Result<T> + Send + 'static,
    ) -> anyhow::Result<T> {
        let (api, task) = (self.api.clone(), self.task.clone());
        spawn_blocking(move || work(api, task)).await?
    }

    /// Asks again and again until there is an answer.
    async fn until_some<T: Send + 'static>(
        &self,
        otherwise: &'static str,
        look: fn(&Api, &str) -> anyhow::Result<Option<T>>,
    ) -> anyhow::Result<T> {
        loop {
            // A coordinator that was killed is back in a moment.
            if let Ok(Some(found)) = self.ask(move |api, task| look(&api, &task)).await {
                return Ok(found);
            }
            anyhow::ensure!(Instant::now() < self.until, otherwise);
            sleep(LOOK).await;
        }
    }

    /// Labels images by lot, of those that came after `since`, and puts them into the holdout.
    async fn hold_out(&self, since: i64) -> anyhow::Result<usize> {
        let mut dice = Dice::new(1);
        let mut done = 0;
        let mut after = since;
        while done < HOLDOUT {
            anyhow::ensure!(Instant::now() < self.until, "too few images arrive");
            let from = after;
            let fresh = self.ask(move |api, task| fresh(&api, &task, from)).await?;
            for id in fresh {
                after = after.max(id);
                // About half stays for the queue.
                if done < HOLDOUT && dice.below(2) == 0 {
                    done += usize::from(self.ask(move |api, _| label(&api, id, true)).await?);
                }
            }
            sleep(BREATH).await;
        }
        Ok(done)
    }

    /// Labels what the queue puts first.
    async fn label(&self) -> anyhow::Result<usize> {
        let mut done = 0;
        while done < LABELS {
            anyhow::ensure!(Instant::now() < self.until, "too few images arrive");
            done += self
                .ask(|api, task| {
                    let path = format!("/tasks/{task}/queue?limit={AT_ONCE}");
                    let queue = api.get(&path)?;
                    let mut done = 0;
                    for item in queue["items"].as_array().into_iter().flatten() {
                        let id = item["id"].as_i64().context("a sample without a number")?;
                        done += usize::from(label(&api, id, false)?);
                    }
                    Ok(done)
                })
                .await?;
            sleep(BREATH).await;
        }
        Ok(done)
    }
}

/// The signs of drift, if any device sees any.
fn drift(api: &Api, _task: &str) -> anyhow::Result<Option<String>> {
    let devices = api.get("/devices")?;
    let mut said = Vec::new();
    for device in devices["items"].as_array().into_iter().flatten() {
        for drift in device["drift"].as_array().into_iter().flatten() {
            let names = drift["names"].as_str().unwrap_or_default();
            // Between two windows the old and the new light mix: only what also looks new counts.
            if names
                .split(',')
                .any(|name| ["embedding", "novelty", "scores", "unknown"].contains(&name))
            {
                let name = device["device"].as_str().unwrap_or("?");
                said.push(format!("{name} ({})", names.replace(',', ", ")));
            }
        }
    }
    Ok((!said.is_empty()).then(|| said.join(", ")))
}

/// The number of the newest sample.
fn newest(api: &Api, task: &str) -> anyhow::Result<i64> {
    let page = api.get(&format!("/samples?task={task}&limit=1"))?;
    Ok(page["items"][0]["id"].as_i64().unwrap_or_default())
}

/// Samples with an image and without a label that came after `since`, in order of arrival.
fn fresh(api: &Api, task: &str, since: i64) -> anyhow::Result<Vec<i64>> {
    let page = api.get(&format!("/samples?task={task}&labelled=false&limit=500"))?;
    let mut ids: Vec<i64> = page["items"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|item| item["image"] == "stored")
        .filter_map(|item| item["id"].as_i64())
        .filter(|id| *id > since)
        .collect();
    ids.sort_unstable();
    Ok(ids)
}

/// Plays the person: says about a sample what its camera knows, which is in the reading. False if that has not
/// arrived.
fn label(api: &Api, id: i64, holdout: bool) -> anyhow::Result<bool> {
    let sample = api.get(&format!("/samples/{id}"))?;
    let (Some(device), Some(ts)) = (sample["device"].as_str(), sample["ts"].as_i64()) else {
        return Ok(false);
    };
    let readings = api.get(&format!(
        "/readings?device={device}&since={ts}&until={}",
        ts + 1
    ))?;
    let same =
        |reading: &&Value| reading["epoch"] == sample["epoch"] && reading["seq"] == sample["seq"];
    let reading = readings["items"]
        .as_array()
        .into_iter()
        .flatten()
        .find(same);
    let Some(truth) = reading.and_then(|reading| reading["truth"].as_str()) else {
        return Ok(false);
    };
    if holdout {
        let said = json!({"holdout": true});
        api.put(&format!("/samples/{id}/holdout"), &said)?;
    }
    let said = json!({"class": truth});
    api.post(&format!("/samples/{id}/labels"), &said)?;
    Ok(true)
}

/// The model that came out of the newest training of the task, if it has ended.
fn trained(api: &Api, task: &str) -> anyhow::Result<Option<String>> {
    let jobs = api.get("/jobs?limit=20")?;
    let job = jobs
        .as_array()
        .into_iter()
        .flatten()
        .find(|job| job["task"] == task);
    let Some(job) = job else { return Ok(None) };
    match job["state"].as_str() {
        Some("done") => Ok(job["model"].as_str().map(str::to_owned)),
        _ => Ok(None),
    }
}
