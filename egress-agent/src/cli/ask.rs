//! Requests to the running agent, and the layout of its answers.

use std::{
    fmt::Write as _,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};

use crate::serve::protocol::{RESPONSE_MAX, Request, Response};

/// How long the agent may take to answer.
const PATIENCE: Duration = Duration::from_secs(15);

/// Sends a request to the agent. Returns its answer.
///
/// # Errors
///
/// When no agent answers, or the agent answers with an error.
pub(super) fn ask(socket: &Path, request: &Request) -> Result<Response> {
    let mut stream = UnixStream::connect(socket).with_context(|| {
        format!(
            "cannot connect to the agent on {}: check that it runs, that this is the `socket` of its \
             configuration, and that you are root",
            socket.display()
        )
    })?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    stream
        .write_all(&line)
        .context("cannot send the request to the agent")?;
    let mut answer = Vec::new();
    BufReader::new(stream)
        .take(RESPONSE_MAX)
        .read_until(b'\n', &mut answer)
        .context("the agent did not answer")?;
    match serde_json::from_slice(&answer)
        .context("cannot read the agent's answer: it may be of another version")?
    {
        Response::Error(error) => bail!("{error}"),
        response => Ok(response),
    }
}

/// Rows in aligned columns. Lines have no spaces at their end.
pub(super) fn columns(indent: &str, rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..rows.iter().map(Vec::len).max().unwrap_or(0))
        .map(width)
        .collect();
    let mut text = String::new();
    for row in rows {
        let mut line = indent.to_owned();
        for (cell, width) in row.iter().zip(&widths) {
            let _ = write!(line, "{cell:width$}  ");
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// A time span in its two largest units.
pub(super) fn span(seconds: u64) -> String {
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m{}s", seconds % 60),
        (0, ..) => format!("{hours}h{minutes}m"),
        _ => format!("{days}d{hours}h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_have_their_two_largest_units() {
        for (seconds, text) in [
            (0, "0s"),
            (59, "59s"),
            (61, "1m1s"),
            (3661, "1h1m"),
            (90_000, "1d1h"),
        ] {
            assert_eq!(span(seconds), text);
        }
    }

    #[test]
    fn columns_are_aligned() {
        let rows = [vec!["a".into(), "b".into()], vec!["ccc".into(), "d".into()]];
        assert_eq!(columns(" ", &rows), " a    b\n ccc  d\n");
    }
}
