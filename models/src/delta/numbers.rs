//! The difference of two lists of numbers, in a form that compresses well.
//!
//! A weight that moved a little differs by few steps on the scale of all values of its type. The
//! difference is counted in such steps, modulo the number of values, so it is exact for every bit
//! pattern; small ones of either sign become small numbers (zigzag), and their bytes are stored plane
//! by plane: all lowest bytes, all second ones, and so on, the high planes nearly all zero.

/// How a tensor stores its numbers; the value is how many bytes each takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Whole numbers of eight bits, with or without sign.
    Byte = 1,
    /// Floats of 16 bits, of either kind.
    Half = 2,
    /// Floats of 32 bits.
    Single = 4,
}

impl Kind {
    /// Bytes of one number.
    pub(super) fn width(self) -> usize {
        self as usize
    }

    /// The kind of that width.
    pub(super) fn of_width(width: u64) -> Option<Self> {
        [Self::Byte, Self::Half, Self::Single]
            .into_iter()
            .find(|kind| *kind as u64 == width)
    }
}

/// Writes `new` less `old` to `planes`; all are of one length, a multiple of the width.
pub(super) fn difference(kind: Kind, old: &[u8], new: &[u8], planes: &mut [u8]) {
    match kind {
        Kind::Byte => Number::<1>::difference(old, new, planes),
        Kind::Half => Number::<2>::difference(old, new, planes),
        Kind::Single => Number::<4>::difference(old, new, planes),
    }
}

/// Writes `old` with the difference in `planes` added to `new`.
pub(super) fn restore(kind: Kind, old: &[u8], planes: &[u8], new: &mut [u8]) {
    match kind {
        Kind::Byte => Number::<1>::restore(old, planes, new),
        Kind::Half => Number::<2>::restore(old, planes, new),
        Kind::Single => Number::<4>::restore(old, planes, new),
    }
}

/// Numbers of `W` bytes, in the low bits of a `u32`.
struct Number<const W: usize>;

impl<const W: usize> Number<W> {
    const TOP: u32 = 1 << (8 * W - 1);
    const ALL: u32 = Self::TOP | (Self::TOP - 1);

    fn load(bytes: [u8; W]) -> u32 {
        bytes.iter().rev().fold(0, |n, &b| n << 8 | u32::from(b))
    }

    /// Bits to their place on the scale. Floats are stored as sign and amount: the negative ones run
    /// backwards.
    fn ordered(bits: u32) -> u32 {
        match W {
            1 => bits,
            _ if bits & Self::TOP != 0 => !bits & Self::ALL,
            _ => bits | Self::TOP,
        }
    }

    /// The way back from [`Self::ordered`].
    fn bits(ordered: u32) -> u32 {
        match W {
            1 => ordered,
            _ if ordered & Self::TOP != 0 => ordered & !Self::TOP,
            _ => !ordered & Self::ALL,
        }
    }

    fn difference(old: &[u8], new: &[u8], planes: &mut [u8]) {
        let count = new.len() / W;
        let pairs = old.as_chunks::<W>().0.iter().zip(new.as_chunks::<W>().0);
        for (at, (&old, &new)) in pairs.enumerate() {
            let (old, new) = (Self::load(old), Self::load(new));
            let steps = Self::ordered(new).wrapping_sub(Self::ordered(old)) & Self::ALL;
            let sign = if steps & Self::TOP == 0 { 0 } else { Self::ALL };
            let zigzag = (steps << 1 & Self::ALL) ^ sign;
            for (plane, byte) in zigzag.to_le_bytes().into_iter().take(W).enumerate() {
                planes[plane * count + at] = byte;
            }
        }
    }

    fn restore(old: &[u8], planes: &[u8], new: &mut [u8]) {
        let count = planes.len() / W;
        let pairs = old.as_chunks::<W>().0.iter();
        for (at, (&old, new)) in pairs.zip(new.as_chunks_mut::<W>().0).enumerate() {
            let zigzag = Self::load(std::array::from_fn(|plane| planes[plane * count + at]));
            let sign = if zigzag & 1 == 0 { 0 } else { Self::ALL };
            let steps = (zigzag >> 1) ^ sign;
            let ordered = Self::ordered(Self::load(old)).wrapping_add(steps) & Self::ALL;
            let bytes = Self::bits(ordered).to_le_bytes();
            new.iter_mut().zip(bytes).for_each(|(to, byte)| *to = byte);
        }
    }
}
