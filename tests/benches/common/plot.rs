//! Charts of ratios to bare, as SVG.

use std::{fs, path::PathBuf};

use egress_tests::workspace;
use svg::{
    Document, Node,
    node::element::{Circle, Group, Line, Rectangle, Text, Title},
};

use super::Spread;

const WIDTH: f64 = 860.0;
const ROW: f64 = 22.0;
/// Where the names of rows end and the scale begins, and where the scale ends and the numbers begin.
const SCALE: (f64, f64) = (250.0, 660.0);
/// The height of the title and the numbers of the scale.
const HEAD: f64 = 58.0;
const COLORS: [&str; 3] = ["#1f6feb", "#8250df", "#bc4c00"];

/// A chart of ratios on a logarithmic scale. A dot is a median, and a line the middle half of the rounds.
pub(crate) struct Chart {
    title: String,
    groups: Vec<(String, Vec<(&'static str, Spread)>)>,
}

impl Chart {
    pub(crate) fn new(title: &str) -> Self {
        Self {
            title: title.to_owned(),
            groups: Vec::new(),
        }
    }

    /// Adds a heading and, below it, a row for each variant with its ratio.
    pub(crate) fn add(&mut self, heading: &str, variants: &[&'static str], ratios: Vec<Spread>) {
        let rows = variants.iter().copied().zip(ratios).collect();
        self.groups.push((heading.to_owned(), rows));
    }

    /// Writes the chart to a file of this name in the build's directory, and prints its path.
    pub(crate) fn write(&self, name: &str) {
        let directory: PathBuf = workspace::scratch().join("charts");
        fs::create_dir_all(&directory).expect("a directory below the build's");
        let path = directory.join(format!("{name}.svg"));
        svg::save(&path, &self.draw()).expect("write a chart");
        println!("chart: {}\n", path.display());
    }

    fn draw(&self) -> Document {
        let rows = || self.groups.iter().flat_map(|(_, rows)| rows);
        let lines = self.groups.len() + rows().count();
        let height = HEAD + lines as f64 * ROW + 12.0;
        let low = rows().map(|(_, ratio)| ratio.low).fold(0.5, f64::min);
        let high = rows().map(|(_, ratio)| ratio.high).fold(2.0, f64::max);
        let scale = Scale {
            low: low.log2().floor(),
            high: high.log2().ceil(),
        };
        let mut document = Document::new()
            .set("viewBox", (0, 0, WIDTH, height))
            .set("font-family", "sans-serif")
            .set("font-size", 13)
            .add(Title::new(&self.title))
            .add(
                Rectangle::new()
                    .set("width", "100%")
                    .set("height", "100%")
                    .set("fill", "#ffffff"),
            )
            .add(text(12.0, 22.0, &self.title).set("font-weight", "bold"))
            .add(scale.draw(height));
        let mut y = HEAD + ROW / 2.0;
        for (heading, rows) in &self.groups {
            document.append(text(12.0, y, heading).set("fill", "#57606a"));
            y += ROW;
            for ((what, ratio), color) in rows.iter().zip(COLORS.iter().cycle()) {
                document.append(row(&scale, y, what, *ratio, color));
                y += ROW;
            }
        }
        document
    }
}

/// The logarithms, to the base of 2, of the least and the greatest ratio.
struct Scale {
    low: f64,
    high: f64,
}

impl Scale {
    fn x(&self, ratio: f64) -> f64 {
        let part = (ratio.log2() - self.low) / (self.high - self.low);
        SCALE.0 + part * (SCALE.1 - SCALE.0)
    }

    /// A line for each power of 2; that of 1, bare, stands out.
    fn draw(&self, height: f64) -> Group {
        let mut group = Group::new();
        let mut power = self.low;
        while power <= self.high {
            let ratio = power.exp2();
            let x = self.x(ratio);
            let color = if power == 0.0 { "#24292f" } else { "#d0d7de" };
            group.append(line((x, HEAD - 6.0), (x, height - 8.0), color, 1.0));
            let number = text(x, HEAD - 12.0, &format!("{ratio}")).set("text-anchor", "middle");
            group.append(number.set("fill", "#57606a"));
            power += 1.0;
        }
        group
    }
}

fn row(scale: &Scale, y: f64, what: &str, ratio: Spread, color: &str) -> Group {
    let (low, high) = (scale.x(ratio.low), scale.x(ratio.high));
    Group::new()
        .add(text(28.0, y, what))
        .add(line((low, y - 4.0), (high, y - 4.0), color, 3.0))
        .add(
            Circle::new()
                .set("cx", scale.x(ratio.middle))
                .set("cy", y - 4.0)
                .set("r", 5)
                .set("fill", color),
        )
        .add(text(SCALE.1 + 20.0, y, &ratio.ratio()))
}

fn text(x: f64, y: f64, content: &str) -> Text {
    Text::new(content).set("x", x).set("y", y)
}

fn line(from: (f64, f64), to: (f64, f64), color: &str, width: f64) -> Line {
    Line::new()
        .set("x1", from.0)
        .set("y1", from.1)
        .set("x2", to.0)
        .set("y2", to.1)
        .set("stroke", color)
        .set("stroke-width", width)
}
