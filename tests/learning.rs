//! The loop as somebody with a folder of images runs it.

use fleet::process::{Process, Program};
use tests::BOUND;

/// One picture of a class: stripes, rings or blots, each a little different.
fn picture(class: usize, n: u32) -> image::RgbImage {
    image::RgbImage::from_fn(90, 70, |x, y| {
        let (x, y) = (f64::from(x + 13 * n), f64::from(y + 7 * n));
        let noise = f64::from((n * 7_919 + x as u32 * 31 + y as u32 * 17) % 23);
        let (dx, dy) = (x % 40.0 - 20.0, y % 40.0 - 20.0);
        let value = match class {
            0 => (x / 4.0).sin() * 60.0,
            1 => ((dx * dx + dy * dy).sqrt() / 2.0).sin() * 60.0,
            _ => ((x / 9.0).sin() * (y / 9.0).sin()).signum() * 60.0,
        };
        let value = (128.0 + value + noise) as u8;
        image::Rgb([value, value, (value / 2).saturating_add(40)])
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn what_devices_saw_becomes_a_judged_model() {
    let dir = tempfile::tempdir().unwrap();
    let images = dir.path().join("images");
    for (class, name) in ["stripes", "rings", "blots & more"].into_iter().enumerate() {
        let folder = images.join(name);
        std::fs::create_dir_all(&folder).unwrap();
        for n in 0..60 {
            let file = folder.join(format!("{n:02}.png"));
            picture(class, n).save(file).unwrap();
        }
    }
    let report = dir.path().join("report.json");
    let node = Program(env!("CARGO_BIN_EXE_node").into());
    let args = [
        "--per-class",
        "2",
        "--labels",
        "12",
        "--agents",
        "2",
        "--train-rounds",
        "2",
    ];
    let args = ["--images".into(), images.into()]
        .into_iter()
        .chain(args.map(Into::into));
    let args = args.chain(["--json".into(), report.clone().into()]);
    let mut run = Process::part("loop", &node, "loop", args, dir.path().join("log"));
    run.start().unwrap();
    assert!(run.ended(BOUND).await, "{}", run.last_words());
    let text = std::fs::read_to_string(report).unwrap();
    let report: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(
        (&report["classes"], &report["holdout"]),
        (&3.into(), &36.into()),
        "{text}"
    );
    assert_eq!(report["labels"], 18, "{text}");
    assert_eq!(report["curve"].as_array().unwrap().len(), 3, "{text}");
    assert!(report["accuracy_after"].as_f64() > Some(0.8), "{text}");
    // Thirty-six held-back pictures prove nothing, and the gate says so.
    assert_eq!(report["passed"], false, "{text}");
    assert!(text.contains("\"total\""), "{text}");
}
