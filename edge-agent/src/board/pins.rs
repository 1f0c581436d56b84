//! GPIO lines of Linux, through its character device.

use linux_embedded_hal::{
    CdevPin,
    gpio_cdev::{Chip, Line as CdevLine, LineRequestFlags, errors::Error},
};

use super::{BoardConfig, BoardError, Line, Pins, Wired};

/// Who uses the line, as `gpioinfo` shows it.
const CONSUMER: &str = "lacewing";

/// Takes every configured line. Outputs start inactive.
pub(super) fn take(config: &BoardConfig) -> Result<Pins<CdevPin, CdevPin, CdevPin>, BoardError> {
    let output = |name, line: &Option<Line>| request(name, line.as_ref(), LineRequestFlags::OUTPUT);
    Ok(Pins {
        led: output("led", &config.led)?,
        trigger: request("trigger", config.trigger.as_ref(), LineRequestFlags::INPUT)?,
        reject: output("reject", &config.reject)?,
        button: request(
            "button",
            config.button.as_ref().map(super::Button::wiring).as_ref(),
            LineRequestFlags::INPUT,
        )?,
    })
}

/// Asks for the lines without taking them.
pub(super) fn look(config: &BoardConfig) -> Result<String, BoardError> {
    let mut said = Vec::new();
    for (name, line) in config.lines() {
        let info = find(&line)
            .and_then(|found| found.info())
            .map_err(|error| failed(name, &line, error))?;
        let user = info.consumer().filter(|_| info.is_used());
        said.push(match user {
            Some(user) => format!("{name}: {} line {}, in use by {user}", line.chip, line.line),
            None => format!("{name}: {} line {}", line.chip, line.line),
        });
    }
    Ok(said.join("; "))
}

/// The levels are inverted by [`Wired`], not by the kernel: then a pin is the same on every platform.
fn request(
    name: &'static str,
    line: Option<&Line>,
    flags: LineRequestFlags,
) -> Result<Option<Wired<CdevPin>>, BoardError> {
    let Some(line) = line else { return Ok(None) };
    find(line)
        .and_then(|found| found.request(flags, u8::from(line.active_low), CONSUMER))
        .and_then(CdevPin::new)
        .map(|pin| Some(Wired::new(pin, name, line.active_low)))
        .map_err(|error| failed(name, line, error))
}

fn find(line: &Line) -> Result<CdevLine, Error> {
    Chip::new(&line.chip)?.get_line(line.line)
}

fn failed(what: &'static str, line: &Line, error: Error) -> BoardError {
    BoardError::Pin {
        what,
        chip: line.chip.clone(),
        line: line.line,
        why: error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Board;
    use super::*;

    #[test]
    fn a_chip_that_is_not_there_is_named() {
        let line = Line {
            chip: "/dev/no-such-chip".into(),
            line: 3,
            active_low: false,
        };
        let config = BoardConfig {
            led: Some(line),
            ..BoardConfig::default()
        };
        for error in [Board::start(&config).err(), Board::try_pins(&config).err()] {
            let error = error.unwrap().to_string();
            assert!(
                error.contains("led") && error.contains("/dev/no-such-chip line 3"),
                "{error}"
            );
        }
    }
}
