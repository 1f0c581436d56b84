//! A head trained here and by scikit-learn, in turns, on the same embeddings of the same pictures.
//!
//! `head_bench <folder with train/<class>/*.jpg> [per class to train, 100] [to test, 5000] [turns, 5]`.
//! The peer is `tests/peers/head.py`, run by the Python of `LACEWING_ML_PYTHON` (default `python3`), which needs
//! scikit-learn. Set `OPENBLAS_NUM_THREADS=1` for a peer of one thread, as is what runs here. Compare CPU time
//! where the machine is busy.

use std::{
    error::Error,
    fs,
    ops::ControlFlow,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use learn::{
    evaluate::evaluate,
    features::Features,
    head::{Head, Settings, Strength, train},
};
use models::{Bundle, Engine};

type Outcome<T> = Result<T, Box<dyn Error>>;

/// C = 1 at a thousand rows: the peer's default.
const STRENGTH: f64 = 1e-3;
const MOST_ITERATIONS: usize = 1000;

struct Data {
    train: usize,
    dim: usize,
    names: Vec<String>,
    truth: Vec<u32>,
    rows: Vec<f32>,
}

fn sorted(folder: &Path) -> Outcome<Vec<PathBuf>> {
    let paths: Result<Vec<PathBuf>, _> =
        fs::read_dir(folder)?.map(|e| e.map(|e| e.path())).collect();
    let mut paths = paths?;
    paths.sort();
    Ok(paths)
}

fn embed(folder: &Path, per_class: usize, test: usize) -> Outcome<Data> {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let engine = Engine::load(&Bundle::open(&repository.join("models/bundles/backbone"))?)?;
    let classes = sorted(&folder.join("train"))?;
    let mut data = Data {
        train: per_class * classes.len(),
        dim: engine.manifest().output.embedding_dim,
        names: Vec::new(),
        truth: Vec::new(),
        rows: Vec::new(),
    };
    let per_class_test = test / classes.len();
    let mut held = (Vec::new(), Vec::new());
    for (class, folder) in (0u32..).zip(&classes) {
        data.names.push(
            folder
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned(),
        );
        // The first ones teach, the last ones test.
        let files = sorted(folder)?;
        let last = files.len().saturating_sub(per_class_test);
        for (at, path) in files.iter().enumerate() {
            let (truth, rows) = match at {
                at if at < per_class => (&mut data.truth, &mut data.rows),
                at if at >= last => (&mut held.0, &mut held.1),
                _ => continue,
            };
            truth.push(class);
            rows.extend(
                engine
                    .run(&engine.tensor_from_bytes(&fs::read(path)?)?)?
                    .embedding,
            );
        }
    }
    data.truth.extend(held.0);
    data.rows.extend(held.1);
    Ok(data)
}

fn write(data: &Data, path: &Path) -> Outcome<()> {
    let test = data.truth.len() - data.train;
    let mut bytes = Vec::new();
    for size in [data.train, test, data.dim, data.names.len()] {
        bytes.extend(u32::try_from(size)?.to_le_bytes());
    }
    bytes.extend(data.truth.iter().flat_map(|v| v.to_le_bytes()));
    bytes.extend(data.rows.iter().flat_map(|v| v.to_le_bytes()));
    fs::write(path, bytes)?;
    Ok(())
}

/// Accuracy and calibration error on the rows behind the training rows.
fn score(data: &Data, head: &Head) -> Outcome<(f64, f64)> {
    let rows = data.rows[data.train * data.dim..].chunks_exact(data.dim);
    let probabilities: Vec<f32> = rows.flat_map(|row| head.probabilities(row)).collect();
    let result = evaluate(&data.truth[data.train..], &probabilities, &data.names)?;
    Ok((result.accuracy, result.ece))
}

#[expect(clippy::disallowed_methods, reason = "this program measures time")]
fn timed(features: &Features, settings: &Settings) -> Outcome<(Head, Duration, f64)> {
    let (start, before) = (std::time::Instant::now(), cpu_seconds()?);
    let head = train(features, settings, &mut |_| ControlFlow::Continue(()))?;
    Ok((head, start.elapsed(), cpu_seconds()? - before))
}

/// CPU time of this process so far; Linux counts it in hundredths of a second.
fn cpu_seconds() -> Outcome<f64> {
    let stat = fs::read_to_string("/proc/self/stat")?;
    let (_, behind_name) = stat.rsplit_once(')').ok_or("unknown /proc/self/stat")?;
    let ticks: Result<Vec<f64>, _> = behind_name
        .split_whitespace()
        .skip(11)
        .take(2)
        .map(str::parse)
        .collect();
    Ok(ticks?.iter().sum::<f64>() / 100.0)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn main() -> Outcome<()> {
    let args: Vec<String> = std::env::args().collect();
    let folder = args
        .get(1)
        .ok_or("usage: head_bench <folder> [per class] [test] [turns]")?;
    let number = |at: usize, default: usize| args.get(at).map_or(Ok(default), |text| text.parse());
    let (per_class, test, turns) = (number(2, 100)?, number(3, 5000)?, number(4, 5)?);
    let data = embed(Path::new(folder), per_class, test)?;
    let file = std::env::temp_dir().join(format!("head_bench.{}.bin", std::process::id()));
    write(&data, &file)?;
    let rows = data.rows[..data.train * data.dim].to_vec();
    let truth = data.truth[..data.train].to_vec();
    let features = Features::new(data.dim, data.names.len(), rows, truth, None)?;
    let given = Settings {
        strength: Strength::Given(STRENGTH),
        calibrate: false,
        iterations: MOST_ITERATIONS,
        ..Settings::default()
    };
    let peer = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/peers/head.py");
    let python = std::env::var_os("LACEWING_ML_PYTHON").unwrap_or_else(|| "python3".into());
    let (mut ours, mut theirs, mut our_cpu, mut cpu) = (vec![], vec![], vec![], vec![]);
    for turn in 1..=turns {
        let (head, taken, used) = timed(&features, &given)?;
        our_cpu.push(used);
        ours.push(taken.as_secs_f64());
        let arguments = [STRENGTH.to_string(), MOST_ITERATIONS.to_string()];
        let output = Command::new(&python)
            .arg(&peer)
            .arg(&file)
            .args(arguments)
            .output()?;
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into());
        }
        let answer: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        theirs.push(answer["seconds"].as_f64().unwrap_or(f64::NAN));
        cpu.push(answer["cpu_s"].as_f64().unwrap_or(f64::NAN));
        let (accuracy, _) = score(&data, &head)?;
        println!(
            "turn {turn}: here {:.3} s, {used:.2} s CPU, {} iterations, accuracy {accuracy:.4}; peer {answer}",
            taken.as_secs_f64(),
            head.iterations
        );
    }
    let (ours, theirs, our_cpu, cpu) = (median(ours), median(theirs), median(our_cpu), median(cpu));
    println!(
        "{}x{}: here {ours:.3} s ({our_cpu:.2} s CPU), peer {theirs:.3} s ({cpu:.2} s CPU); ratio {:.2} of wall, \
         {:.2} of CPU",
        data.train,
        data.dim,
        ours / theirs,
        our_cpu / cpu
    );
    let (head, taken, _) = timed(&features, &Settings::default())?;
    let (accuracy, ece) = score(&data, &head)?;
    println!(
        "strength chosen: {:.2} s, strength {}, temperature {:.2}, accuracy {accuracy:.4}, ECE {ece:.4}",
        taken.as_secs_f64(),
        head.strength,
        head.temperature
    );
    fs::remove_file(&file)?;
    Ok(())
}
