//! Trains the backbone with a 10-class head on CIFAR-10 and tells losses and time per epoch; writes what
//! `tests/peers/tune.py --bench` needs to do the same in PyTorch.
//!
//! `tune_bench DATA OUT [pictures] [side] [epochs] [threads] [mode] [rate] [tests]`: DATA holds
//! `<class>/NNNN.jpg`; mode is `all`, `head` or the number of last layers to train; with `tests`, pictures from
//! number 4000 of each class are answered afterwards.

use std::{error::Error, ops::ControlFlow, path::Path, time::Instant};

use learn::tune::{Batch, Data, Graph, Settings, Train, estimate, train};
use prost::Message;
use tract_onnx::pb::{
    AttributeProto, ModelProto, NodeProto, TensorProto, TensorShapeProto, TypeProto,
    ValueInfoProto,
    attribute_proto::AttributeType,
    tensor_proto::DataType,
    tensor_shape_proto::{Dimension, dimension},
    type_proto,
};

/// The backbone with a head of zeros: the start is the same for everyone.
fn with_head(
    onnx: &[u8],
    dim: usize,
    classes: usize,
    side: usize,
) -> Result<Vec<u8>, Box<dyn Error>> {
    let mut model = ModelProto::decode(onnx)?;
    let graph = model.graph.as_mut().ok_or("no graph")?;
    let tensor = |name: &str, dims: &[usize]| TensorProto {
        name: name.into(),
        dims: dims.iter().map(|&dim| dim as i64).collect(),
        data_type: DataType::Float as i32,
        raw_data: vec![0; 4 * dims.iter().product::<usize>()],
        ..TensorProto::default()
    };
    graph
        .initializer
        .push(tensor("head.weight", &[classes, dim]));
    graph.initializer.push(tensor("head.bias", &[classes]));
    graph.node.push(NodeProto {
        name: "logits".into(),
        op_type: "Gemm".into(),
        input: ["embedding", "head.weight", "head.bias"]
            .map(String::from)
            .to_vec(),
        output: vec!["logits".into()],
        attribute: vec![AttributeProto {
            name: "transB".into(),
            r#type: AttributeType::Int as i32,
            i: 1,
            ..AttributeProto::default()
        }],
        ..NodeProto::default()
    });
    let shape = |dims: &[usize]| TypeProto {
        value: Some(type_proto::Value::TensorType(type_proto::Tensor {
            elem_type: DataType::Float as i32,
            shape: Some(TensorShapeProto {
                dim: dims
                    .iter()
                    .map(|&dim| Dimension {
                        value: Some(dimension::Value::DimValue(dim as i64)),
                        ..Dimension::default()
                    })
                    .collect(),
            }),
        })),
        ..TypeProto::default()
    };
    graph.input[0].r#type = Some(shape(&[1, 3, side, side]));
    graph.output = vec![ValueInfoProto {
        name: "logits".into(),
        r#type: Some(shape(&[1, classes])),
        ..ValueInfoProto::default()
    }];
    Ok(model.encode_to_vec())
}

/// `count` pictures of `DATA/<class>/NNNN.jpg`, from number `first` of each class, class by class in turn; each
/// enlarged to `side` by repeating pixels and brought to the network's range.
fn pictures(
    folder: &Path,
    first: usize,
    count: usize,
    side: usize,
) -> Result<Batch, Box<dyn Error>> {
    let entries = std::fs::read_dir(folder)?.map(|entry| entry.map(|entry| entry.path()));
    let mut classes: Vec<_> = entries.collect::<Result<_, _>>()?;
    classes.sort();
    let mut batch = Batch::default();
    for number in 0..count {
        let (class, file) = (number % classes.len(), first + number / classes.len());
        let picture = models::Picture::read(&classes[class].join(format!("{file:04}.jpg")))?;
        let (width, height) = (picture.width() as usize, picture.height() as usize);
        for channel in 0..3 {
            for y in 0..side {
                for x in 0..side {
                    let pixel = y * height / side * width + x * width / side;
                    let value = f32::from(picture.rgb()[pixel * 3 + channel]) / 255.0;
                    batch.pictures.push((value - 0.5) / 0.25);
                }
            }
        }
        batch.labels.push(class as u32);
    }
    Ok(batch)
}

/// Share of right answers.
fn accuracy(onnx: &[u8], batch: &Batch) -> Result<f64, Box<dyn Error>> {
    let graph = Graph::read(onnx, "image", "logits")?;
    let mut right = 0;
    let pictures = batch.pictures.chunks(100 * graph.input_len());
    for (pictures, labels) in pictures.zip(batch.labels.chunks(100)) {
        let logits = graph.forward(pictures)?;
        for (logits, label) in logits.chunks_exact(graph.output_len()).zip(labels) {
            let best = (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b]));
            right += usize::from(best == Some(*label as usize));
        }
    }
    Ok(right as f64 / batch.labels.len() as f64)
}

#[expect(clippy::disallowed_methods, reason = "a measurement needs the clock")]
fn now() -> Instant {
    Instant::now()
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [folder, out, rest @ ..] = arguments.as_slice() else {
        return Err(
            "tune_bench DATA OUT [pictures] [side] [epochs] [threads] [mode] [rate] [tests]".into(),
        );
    };
    let number = |at: usize, default: usize| rest.get(at).map_or(Ok(default), |text| text.parse());
    let (count, side, tests) = (number(0, 1000)?, number(1, 96)?, number(6, 0)?);
    let mode = rest.get(4).map_or("all", String::as_str);
    let settings = Settings {
        epochs: number(2, 2)?,
        threads: number(3, 2)?,
        train: match mode {
            "all" => Train::All,
            "head" => Train::LastBlocks(1),
            layers => Train::LastBlocks(layers.parse()?),
        },
        rate: rest.get(5).map_or(Ok(0.01), |text| text.parse())?,
        ..Settings::default()
    };
    let backbone =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/bundles/backbone/model.onnx");
    let onnx = with_head(&std::fs::read(backbone)?, 704, 10, side)?;
    let batch = pictures(Path::new(folder), 0, count, side)?;
    let out = Path::new(out);
    std::fs::create_dir_all(out)?;
    std::fs::write(out.join("head.onnx"), &onnx)?;
    let graph = Graph::read(&onnx, "image", "logits")?;
    println!(
        "{} MMAC, {} layers",
        graph.macs() / 1_000_000,
        graph.layers()
    );
    println!("{} MiB", estimate(&graph, &settings, count)? >> 20);
    let len = graph.input_len();
    // With tests: data in memory, in an order of its own every epoch, so that what is frozen runs once.
    // Without: batches in a row, as PyTorch takes them.
    if tests == 0 {
        let bytes = |values: &[f32]| {
            values
                .iter()
                .flat_map(|v| v.to_le_bytes())
                .collect::<Vec<_>>()
        };
        std::fs::write(out.join("pictures.f32"), bytes(&batch.pictures))?;
        let labels = batch.labels.iter().flat_map(|label| label.to_le_bytes());
        std::fs::write(out.join("labels.u32"), labels.collect::<Vec<_>>())?;
    }
    let steps = count.div_ceil(settings.batch);
    let mut next = |number: usize| {
        let range =
            number % steps * settings.batch..count.min((number % steps + 1) * settings.batch);
        Batch {
            pictures: batch.pictures[range.start * len..range.end * len].to_vec(),
            labels: batch.labels[range].to_vec(),
        }
    };
    let data = if tests == 0 {
        Data::Stream {
            steps,
            next: &mut next,
        }
    } else {
        Data::Memory(&batch)
    };
    let mut start = now();
    let mut seconds = Vec::new();
    let tuned = train(&graph, data, &settings, &mut |progress| {
        if progress.step == progress.steps {
            seconds.push(start.elapsed().as_secs_f64());
            println!(
                "epoch {}: {:.2} s, loss {:.4}",
                progress.epoch,
                seconds[seconds.len() - 1],
                progress.loss
            );
            start = now();
        }
        ControlFlow::Continue(())
    })?;
    let json = format!(
        "{{\"losses\": {:?}, \"seconds\": {seconds:?}}}",
        tuned.losses
    );
    std::fs::write(out.join("rust.json"), json)?;
    std::fs::write(out.join("tuned.onnx"), &tuned.onnx)?;
    if tests > 0 {
        let batch = pictures(Path::new(folder), 4000, tests, side)?;
        println!("{mode}: accuracy {:.4}", accuracy(&tuned.onnx, &batch)?);
    }
    Ok(())
}
