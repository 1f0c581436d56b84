//! One 8×8 block: from bits to coefficients, from coefficients to averages.

use std::{f64::consts::PI, sync::LazyLock};

use super::bits::{Bits, Huffman};

/// Where the n-th stored coefficient stands in the block, row by row.
pub(super) const ZIGZAG: [u8; 64] = [
    0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5, 12, 19, 26, 33, 40, 48, 41, 34, 27, 20,
    13, 6, 7, 14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59,
    52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63,
];

/// Reads a block's coefficients, times their quanta. Returns how many rows from the top have one; 0 if there
/// is none but the first, the block's mean, as in most blocks of most pictures.
#[inline]
pub(super) fn read(
    bits: &mut Bits<'_>,
    dc: &Huffman,
    ac: &Huffman,
    quantum: &[f32; 64],
    previous: &mut i32,
    coefficients: &mut [f32; 64],
) -> Result<usize, &'static str> {
    #[expect(clippy::cast_precision_loss, reason = "coefficients are small")]
    let scaled = |value: i32, at: usize| value as f32 * quantum[at];
    *previous = previous.wrapping_add(dc.difference(bits)?);
    coefficients[0] = scaled(*previous, 0);
    let (mut index, mut rows) = (1, 0);
    while index < 64 {
        let (run, value) = ac.coefficient(bits)?;
        if value == 0 {
            if run != 15 {
                break;
            }
            index += 16;
            continue;
        }
        index += run;
        let Some(&at) = ZIGZAG.get(index) else {
            return Err("a block with too many coefficients");
        };
        let at = usize::from(at & 63);
        coefficients[at] = scaled(value, at);
        rows = rows.max((at >> 3) + 1);
        index += 1;
    }
    Ok(rows)
}

/// Writes a block's averages into rows `stride` apart. Arguments: coefficients, how many rows of them [`read`]
/// found, target, stride.
pub(super) type Transform = fn(&[f32; 64], usize, &mut [u8], usize);

/// The inverse transform of eight values into averages: for 1, 2, 4 and 8 of them, how much each
/// coefficient adds to each.
static WEIGHTS: LazyLock<[[[f32; 8]; 8]; 4]> = LazyLock::new(|| {
    std::array::from_fn(|power| {
        let (outputs, group) = (1usize << power, 8usize >> power);
        std::array::from_fn(|coefficient| {
            std::array::from_fn(|output| {
                if output >= outputs {
                    return 0.0;
                }
                let scale = if coefficient == 0 { 0.5f64.sqrt() } else { 1.0 } / 2.0;
                #[expect(clippy::cast_precision_loss, reason = "small numbers")]
                let cosine =
                    |x: usize| ((2 * x + 1) as f64 * coefficient as f64 * PI / 16.0).cos() * scale;
                let sum: f64 = (output * group..(output + 1) * group).map(cosine).sum();
                #[expect(
                    clippy::cast_precision_loss,
                    clippy::cast_possible_truncation,
                    reason = "weights"
                )]
                let weight = (sum / group as f64) as f32;
                weight
            })
        })
    })
});

#[inline(always)]
fn transform<const X: usize, const Y: usize>(
    coefficients: &[f32; 64],
    rows: usize,
    target: &mut [u8],
    stride: usize,
) {
    let across = &WEIGHTS[X.ilog2() as usize];
    let down = &WEIGHTS[Y.ilog2() as usize];
    if rows == 0 {
        let byte = to_byte(128.5 + coefficients[0] * down[0][0] * across[0][0]);
        for line in target.chunks_mut(stride).take(Y) {
            line.iter_mut().take(X).for_each(|pixel| *pixel = byte);
        }
        return;
    }
    let mut columns = [[0.0f32; 8]; Y];
    for (row, weights) in coefficients.chunks_exact(8).zip(down).take(rows) {
        for (column, &weight) in columns.iter_mut().zip(weights) {
            for (sum, &value) in column.iter_mut().zip(row) {
                *sum += value * weight;
            }
        }
    }
    for (y, column) in columns.iter().enumerate() {
        let mut sums = [128.5f32; X];
        for (&value, weights) in column.iter().zip(across) {
            for (sum, &weight) in sums.iter_mut().zip(weights) {
                *sum += value * weight;
            }
        }
        let Some(line) = target.get_mut(y * stride..y * stride + X) else {
            return;
        };
        for (pixel, sum) in line.iter_mut().zip(sums) {
            *pixel = to_byte(sum);
        }
    }
}

/// A sum as a pixel: truncated, saturating.
#[inline(always)]
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "saturates"
)]
fn to_byte(sum: f32) -> u8 {
    sum as u8
}

/// The transform into `x` × `y` averages (each 1, 2, 4 or 8).
pub(super) fn transform_into(x: usize, y: usize) -> Option<Transform> {
    macro_rules! table {
        ($($x:literal: $($y:literal)+;)+) => {
            match (x, y) {
                $($(($x, $y) => Some(transform::<$x, $y> as Transform),)+)+
                _ => None,
            }
        };
    }
    table! { 1: 1 2 4 8; 2: 1 2 4 8; 4: 1 2 4 8; 8: 1 2 4 8; }
}
