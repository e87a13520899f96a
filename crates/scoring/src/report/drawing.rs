//! Drawings as SVG: lines over steps, and estimates with their intervals.
//!
//! Drawn with plotters in placeholder colours, which become CSS variables afterwards, so that one drawing fits light and
//! dark pages. A chart for a file of its own carries the variables' values itself.

mod crosses;

use anyhow::{Result, anyhow};
use arete_records::redact;
use arete_records::stats::Interval;
use minijinja::HtmlEscape;
use plotters::coord::Shift;
use plotters::prelude::*;

pub use self::crosses::Cross;
use crate::table;

/// Width of a drawing in pixels; scaled by the page.
const WIDTH: i32 = 360;
/// Height of a drawing without a legend.
const HEIGHT: i32 = 236;
const INK: RGBColor = RGBColor(0x10, 0x10, 0x11);
const FAINT: RGBColor = RGBColor(0xE0, 0xE0, 0xE1);
/// Size of letters.
const FONT_PX: f64 = 12.5;
/// Height of a line of the legend, and of an estimate that is one of many.
const LINE_PX: i32 = 18;
/// Points of one line that are closer than this share the hover value of one of them.
const HOVER_PX: i32 = 3;

/// A colour of the page's palette: 0 to 8; the first three are those of original, SFT and final model, the next three
/// those of the aspects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Colour(pub u8);

impl Colour {
    const COUNT: u8 = 9;

    /// That of the model at a place of the summary; the aspects have the three between.
    pub fn of_model(at: usize) -> Self {
        const MODELS: [u8; 6] = [0, 1, 2, 6, 7, 8];
        Self(MODELS[at % MODELS.len()])
    }

    /// That of the turn at a place of the chain; after the three of their own, turns take the other colours.
    pub fn of_turn(place: usize) -> Self {
        let colour = (3 + place) % usize::from(Self::COUNT);
        Self(u8::try_from(colour).expect("below the number of colours"))
    }

    /// That of the virtue at a place of the constitution.
    pub fn of_virtue(place: usize) -> Self {
        let colour = 1 + place % usize::from(Self::COUNT - 1);
        Self(u8::try_from(colour).expect("below the number of colours"))
    }

    fn placeholder(self) -> RGBColor {
        RGBColor(0xA0, 0x00, self.0 % Self::COUNT + 1)
    }
}

/// What the values of a chart are, which says how far its axis may reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// No unit, no bounds.
    Number,
    /// Natural units of information.
    Nats,
    /// Tokens, none or more.
    Tokens,
    /// Parts of a whole, 0 to 1.
    Share,
    /// Parts of a whole, 0 to 100.
    PerCent,
}

impl Unit {
    fn bounds(self) -> [f64; 2] {
        match self {
            Self::Number | Self::Nats => [f64::NEG_INFINITY, f64::INFINITY],
            Self::Tokens => [0.0, f64::INFINITY],
            Self::Share => [0.0, 1.0],
            Self::PerCent => [0.0, 100.0],
        }
    }

    /// What the unit is called behind a value.
    fn suffix(self) -> &'static str {
        match self {
            Self::Number | Self::Share => "",
            Self::Nats => " nats",
            Self::Tokens => " tokens",
            Self::PerCent => " %",
        }
    }

    /// An axis for these values: with a little air, never empty, inside the unit's bounds if the values are.
    fn axis(self, values: impl Iterator<Item = f64> + Clone) -> std::ops::Range<f64> {
        let low = values.clone().fold(f64::INFINITY, f64::min);
        let high = values.fold(f64::NEG_INFINITY, f64::max);
        let [least, most] = self.bounds();
        let air = match (high > low, most - least) {
            (true, _) => 0.08 * (high - low),
            (false, span) if span.is_finite() => 0.1 * span,
            (false, _) => 0.1 * high.abs().max(0.1),
        };
        let start = if low >= least { (low - air).max(least) } else { low - air };
        let end = if high <= most { (high + air).min(most) } else { high + air };
        start..end
    }
}

/// A named line.
#[derive(Clone, Debug)]
pub struct Series {
    /// What the legend says.
    pub name: String,
    /// Its colour.
    pub colour: Colour,
    /// In the order in which the line goes through them.
    pub points: Vec<(f64, f64)>,
    /// Whether it is a bound to compare with: dashed, without a place in the legend.
    pub is_bound: bool,
}

impl Series {
    /// A line.
    pub fn new(name: impl Into<String>, colour: Colour, points: Vec<(f64, f64)>) -> Self {
        Self { name: name.into(), colour, points, is_bound: false }
    }

    /// A level to compare with, over so much of the x axis.
    pub fn bound(
        name: impl Into<String>,
        colour: Colour,
        level: f64,
        [from, to]: [f64; 2],
    ) -> Self {
        let points = vec![(from, level), (to, level)];
        Self { name: name.into(), colour, points, is_bound: true }
    }
}

/// A named estimate.
#[derive(Clone, Debug)]
pub struct Estimate {
    /// What stands beside it.
    pub name: String,
    /// Its colour.
    pub colour: Colour,
    /// Dot and bar.
    pub interval: Interval,
    /// A hollow mark to compare with.
    pub reference: Option<f64>,
}

/// A finished chart.
#[derive(Clone, Debug)]
pub struct Chart {
    /// File name without ending, and anchor in the page.
    pub name: String,
    /// Its headline.
    pub title: String,
    /// What it shows, in a sentence.
    pub caption: String,
    /// The drawing with CSS variables for colours.
    svg: String,
}

impl Chart {
    /// Lines over steps; none if no series has a point.
    ///
    /// # Errors
    ///
    /// The drawing library's failure if plotters refuses.
    pub fn lines(
        name: &str,
        title: &str,
        caption: &str,
        x_label: &str,
        unit: Unit,
        series: &[Series],
    ) -> Result<Option<Self>> {
        let series: Vec<Series> = series.iter().filter_map(finite).collect();
        if series.is_empty() {
            return Ok(None);
        }
        let legend = Legend::of(&series);
        let height = HEIGHT + legend.height - legend.height.min(LINE_PX);
        let svg = draw(name, height, |area| lines(area, x_label, unit, &series, &legend))?;
        Ok(Some(Self::new(name, title, caption, svg)))
    }

    /// Estimates with their intervals, one below the other; a dashed line at `zero` if it is given. None without
    /// estimates.
    ///
    /// # Errors
    ///
    /// The drawing library's failure if plotters refuses.
    pub fn estimates(
        name: &str,
        title: &str,
        caption: &str,
        unit: Unit,
        estimates: &[Estimate],
        zero: Option<f64>,
    ) -> Result<Option<Self>> {
        let usable = |e: &&Estimate| {
            [e.interval.estimate, e.interval.low, e.interval.high].iter().all(|x| x.is_finite())
        };
        let named = |e: &Estimate| Estimate { name: shown(&e.name), ..e.clone() };
        let estimates: Vec<Estimate> = estimates.iter().filter(usable).map(named).collect();
        if estimates.is_empty() {
            return Ok(None);
        }
        let height = HEIGHT.max(LINE_PX * (estimates.len() as i32 + 2));
        let svg = draw(name, height, |area| dots(area, unit, &estimates, zero))?;
        Ok(Some(Self::new(name, title, caption, svg)))
    }

    fn new(name: &str, title: &str, caption: &str, mut svg: String) -> Self {
        svg = svg
            .replace(&hex(INK), "var(--dim)")
            .replace(&hex(FAINT), "var(--line)")
            .replace("font-family=\"sans-serif\"", "font-family=\"inherit\"");
        for index in 0..Colour::COUNT {
            svg = svg.replace(&hex(Colour(index).placeholder()), &format!("var(--s{index})"));
        }
        let [title, caption] = [title, caption].map(shown);
        Self { name: name.to_owned(), title, caption, svg }
    }

    /// The drawing as part of a page that defines the colours.
    pub fn inline(&self) -> String {
        let size = self.svg.find(" width=").zip(self.svg.find(" viewBox="));
        let (from, to) = size.expect("plotters writes width, height and viewBox, in this order");
        let label = HtmlEscape(&self.title);
        format!(
            "{} role=\"img\" aria-label=\"{label}\"{}",
            &self.svg[..from],
            self.svg[to..].trim_end()
        )
    }

    /// The drawing as a file of its own.
    pub fn standalone(&self) -> String {
        let style = "<style>svg{--dim:#5f5a52;--line:#dfdbd3;--s0:#7d8590;--s1:#2f7d8c;--s2:#b4552d;--s3:#6a5aa8;\
                     --s4:#6d8a34;--s5:#b0862a;--s6:#a8527c;--s7:#3f6fb0;--s8:#7a6248;font-family:system-ui,sans-serif;background:#fdfcfa}\
                     .tip:hover{stroke:var(--dim)}\
                     @media(prefers-color-scheme:dark){svg{--dim:#a49e93;--line:#3a3731;--s0:#9aa2ad;--s1:#62b6c4;\
                     --s2:#e08a5e;--s3:#a99be6;--s4:#a3c25f;--s5:#dcb55c;--s6:#dc8ab2;--s7:#86aee6;--s8:#c0a586;background:#1b1a18}}</style>";
        match self.svg.find('>') {
            Some(end) => format!("{}{style}{}", &self.svg[..=end], &self.svg[end + 1..]),
            None => self.svg.clone(),
        }
    }
}

fn hex(colour: RGBColor) -> String {
    format!("#{:02X}{:02X}{:02X}", colour.0, colour.1, colour.2)
}

/// A text for everybody.
fn shown(text: &str) -> String {
    redact::redacted(text).into_owned()
}

/// The series without points that are not finite; none if nothing is left.
fn finite(series: &Series) -> Option<Series> {
    let mut series = Series { name: shown(&series.name), ..series.clone() };
    series.points.retain(|(x, y)| x.is_finite() && y.is_finite());
    (!series.points.is_empty()).then_some(series)
}

/// What a reader sees who points at a mark.
struct Tip {
    at: (i32, i32),
    text: String,
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type DrawResult<T> = Result<T, Box<dyn std::error::Error>>;

fn draw(
    name: &str,
    height: i32,
    content: impl FnOnce(&Area<'_>) -> DrawResult<Vec<Tip>>,
) -> Result<String> {
    let mut svg = String::new();
    let tips = {
        let area = SVGBackend::with_string(&mut svg, (WIDTH as u32, height as u32));
        let area = area.into_drawing_area();
        content(&area)
            .and_then(|tips| {
                area.present()?;
                Ok(tips)
            })
            .map_err(|error| anyhow!("chart {name}: {error}"))?
    };
    let tips = tips.iter().map(|Tip { at: (x, y), text }| {
        let text = HtmlEscape(text);
        format!(
            "<circle class=\"tip\" cx=\"{x}\" cy=\"{y}\" r=\"7\" fill=\"transparent\"><title>{text}</title></circle>\n"
        )
    });
    let end = svg.rfind("</svg>").unwrap_or(svg.len());
    svg.insert_str(end, &tips.collect::<String>());
    Ok(svg)
}

fn text_style(colour: RGBColor) -> TextStyle<'static> {
    // plotters divides by 1.24 what it is given.
    ("sans-serif", FONT_PX * 1.24).into_font().color(&colour)
}

/// Pixels that a text takes at most: letters as wide as those of DejaVu Sans, one of the widest of the fonts that readers have.
fn text_px(text: &str) -> i32 {
    let em = |c: char| match c {
        ' ' | 'I' | 'f' | 'i' | 'j' | 'l' | 'r' | 't' | '.' | ',' | ':' | ';' | '\'' | '!'
        | '|' | '-' | '(' | ')' | '[' | ']' | '/' => 0.42,
        'M' | 'W' | 'm' | '%' | '@' => 1.0,
        c if c.is_ascii_lowercase() || c.is_ascii_digit() => 0.65,
        c if c < '\u{250}' || c == '−' => 0.84,
        _ => 1.1,
    };
    (FONT_PX * text.chars().map(em).sum::<f64>()).ceil() as i32
}

/// A text of at most so many pixels, its middle left out if need be: names often differ at their ends.
fn shortened(text: &str, px: i32) -> String {
    if text_px(text) <= px {
        return text.to_owned();
    }
    let letters: Vec<char> = text.chars().collect();
    let cut = |n: usize| {
        let (head, tail) = (&letters[..n.div_ceil(2)], &letters[letters.len() - n / 2..]);
        head.iter().chain(&['…']).chain(tail).collect::<String>()
    };
    (0..letters.len()).rev().map(cut).find(|short| text_px(short) <= px).unwrap_or_default()
}

/// A number with as many digits as the span of its axis asks for.
fn tick(value: f64, span: f64) -> String {
    let digits =
        if span >= 10.0 { 0 } else { (1.3 - span.log10()).ceil().clamp(0.0, 8.0) as usize };
    if value != 0.0 && (span < 1e-5 || value.abs() >= 1e6) {
        return format!("{value:.1e}");
    }
    table::true_minus(&format!("{value:.digits$}"))
}

/// A number of four digits that say something, with its unit.
fn hover_value(value: f64, unit: Unit) -> String {
    let magnitude = if value == 0.0 { 0.0 } else { value.abs().log10().floor() };
    let digits = (3.0 - magnitude).clamp(0.0, 8.0) as usize;
    table::true_minus(&format!("{value:.digits$}")) + unit.suffix()
}

fn lines(
    area: &Area<'_>,
    x_label: &str,
    unit: Unit,
    series: &[Series],
    legend: &Legend,
) -> DrawResult<Vec<Tip>> {
    let all = || series.iter().flat_map(|series| series.points.iter().copied());
    let (low, high) = all()
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), (x, _)| (low.min(x), high.max(x)));
    let x_range = if high > low { low..high } else { low - 0.5..high + 0.5 };
    let y_range = unit.axis(all().map(|(_, y)| y));
    let y_span = y_range.end - y_range.start;
    let x_span = x_range.end - x_range.start;
    // Steps and iterations are counted; between them there is nothing.
    let are_counts = all().all(|(x, _)| x.fract() == 0.0);
    let n_x_labels = if are_counts { (x_span.round() as usize + 1).clamp(2, 6) } else { 5 };

    let y_label_px = [y_range.start, y_range.end].map(|y| text_px(&tick(y, y_span)));

    legend.draw(area)?;
    let mut chart = ChartBuilder::on(area)
        .margin_top(legend.height + if legend.height > 0 { 12 } else { 8 })
        .margin_right(14)
        .margin_bottom(2)
        .x_label_area_size(38)
        .y_label_area_size(54.max(y_label_px[0].max(y_label_px[1]) + 10))
        .build_cartesian_2d(x_range, y_range)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(FAINT)
        .axis_style(FAINT)
        .x_labels(n_x_labels)
        .y_labels(5)
        .x_desc(x_label)
        .label_style(text_style(INK))
        .axis_desc_style(text_style(INK))
        .x_label_formatter(&|x| match (are_counts, x.fract().abs() < 1e-9) {
            (false, _) => tick(*x, x_span),
            (true, true) => tick(*x, 1000.0),
            (true, false) => String::new(),
        })
        .y_label_formatter(&|y| tick(*y, y_span))
        .draw()?;
    let mut tips = Vec::new();
    for series in series {
        let colour = series.colour.placeholder();
        let points = &series.points;
        if series.is_bound {
            let line = points.iter().copied();
            chart.draw_series(DashedLineSeries::new(line, 3, 4, colour.stroke_width(1)))?;
            let text = format!("{}: {}", series.name, hover_value(points[0].1, unit));
            tips.extend(
                points
                    .iter()
                    .map(|&point| Tip { at: chart.backend_coord(&point), text: text.clone() }),
            );
            continue;
        }
        chart.draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(2)))?;
        if points.len() <= 40 {
            // A point without a line through it must be seen by itself.
            let radius = if points.len() == 1 { 4 } else { 2 };
            let dot = |&point| Circle::new(point, radius, colour.filled());
            chart.draw_series(points.iter().map(dot))?;
        }
        let mut last: Option<(i32, i32)> = None;
        for &(x, y) in points {
            let at = chart.backend_coord(&(x, y));
            let is_apart = |last: (i32, i32)| {
                // A path may go up and down at one place; the points of a curve have a place each.
                (at.0 - last.0).abs() >= HOVER_PX
                    || (!are_counts && (at.1 - last.1).abs() >= HOVER_PX)
            };
            if last.is_none_or(is_apart) {
                let x = if x.fract() == 0.0 { x.to_string() } else { hover_value(x, Unit::Number) };
                let text = format!("{}, {x_label} {x}: {}", series.name, hover_value(y, unit));
                tips.push(Tip { at, text });
                last = Some(at);
            }
        }
    }
    Ok(tips)
}

/// Names and colours above a chart that has more than one line, as many in a row as fit.
struct Legend {
    /// Place, colour and name.
    entries: Vec<((i32, i32), Colour, String)>,
    height: i32,
}

impl Legend {
    const LEFT: i32 = 8;
    /// From the start of the mark to that of the name.
    const MARK: i32 = 21;

    fn of(series: &[Series]) -> Self {
        let named = || series.iter().filter(|series| !series.is_bound);
        if named().count() < 2 {
            return Self { entries: Vec::new(), height: 0 };
        }
        let right = WIDTH - 4;
        let (mut x, mut y) = (Self::LEFT, 15);
        let mut entries = Vec::new();
        for series in named() {
            let name = shortened(&series.name, right - Self::LEFT - Self::MARK);
            let width = Self::MARK + text_px(&name);
            if x + width > right {
                (x, y) = (Self::LEFT, y + LINE_PX);
            }
            entries.push(((x, y), series.colour, name));
            x += width + 14;
        }
        Self { entries, height: y + 3 }
    }

    fn draw(&self, area: &Area<'_>) -> DrawResult<()> {
        for &((x, y), colour, ref name) in &self.entries {
            let mark = [(x, y), (x + 16, y)];
            area.draw(&PathElement::new(mark, colour.placeholder().stroke_width(3)))?;
            area.draw(&Text::new(name.as_str(), (x + Self::MARK, y - 7), text_style(INK)))?;
        }
        Ok(())
    }
}

fn dots(
    area: &Area<'_>,
    unit: Unit,
    estimates: &[Estimate],
    zero: Option<f64>,
) -> DrawResult<Vec<Tip>> {
    const MOST_LABEL_PX: i32 = 180;
    let ends = estimates.iter().flat_map(|e| {
        let Interval { estimate, low, high } = e.interval;
        [estimate, low, high].into_iter().chain(e.reference).chain(zero)
    });
    let x_range = unit.axis(ends.collect::<Vec<f64>>().into_iter());
    let span = x_range.end - x_range.start;
    let n = estimates.len() as f64;
    let longest = estimates.iter().map(|e| text_px(&e.name)).max().unwrap_or(0);
    let label_px = longest.min(MOST_LABEL_PX);
    let mut chart = ChartBuilder::on(area)
        .margin_top(8)
        .margin_right(22)
        .margin_bottom(2)
        .margin_left(label_px + 14)
        .x_label_area_size(26)
        .build_cartesian_2d(x_range.clone(), 0.0..n)?;
    chart
        .configure_mesh()
        .disable_y_mesh()
        .disable_y_axis()
        .light_line_style(TRANSPARENT)
        .bold_line_style(FAINT)
        .axis_style(FAINT)
        .x_labels(5)
        .label_style(text_style(INK))
        .x_label_formatter(&|x| tick(*x, span))
        .draw()?;
    if let Some(zero) = zero {
        let line = [(zero, 0.0), (zero, n)];
        chart.draw_series(DashedLineSeries::new(line, 4, 4, INK.stroke_width(1)))?;
    }
    let mut tips = Vec::new();
    for (at, estimate) in estimates.iter().enumerate() {
        let y = n - at as f64 - 0.5;
        let colour = estimate.colour.placeholder();
        let Interval { estimate: centre, low, high } = estimate.interval;
        chart.draw_series([PathElement::new([(low, y), (high, y)], colour.stroke_width(3))])?;
        chart.draw_series([Circle::new((centre, y), 5, colour.filled())])?;
        if let Some(reference) = estimate.reference {
            chart.draw_series([Circle::new((reference, y), 4, INK.stroke_width(1))])?;
        }
        let (_, pixel) = chart.backend_coord(&(x_range.start, y));
        let name = shortened(&estimate.name, label_px);
        area.draw(&Text::new(name, (2, pixel - 8), text_style(INK)))?;
        let [centre_text, low, high] = [centre, low, high].map(|x| hover_value(x, Unit::Number));
        let text = format!("{}: {centre_text} [{low}, {high}]{}", estimate.name, unit.suffix());
        tips.push(Tip { at: chart.backend_coord(&(centre, y)), text });
    }
    Ok(tips)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(name: &str, points: &[(f64, f64)]) -> Series {
        Series::new(name, Colour(1), points.to_vec())
    }

    #[test]
    fn ticks_have_the_digits_their_axis_needs() {
        assert_eq!(tick(100.0, 200.0), "100");
        assert_eq!(tick(0.5, 2.0), "0.5");
        assert_eq!(tick(-0.25, 0.5), "−0.25");
        assert_eq!(tick(-0.0, 0.5), "0.00");
        assert_eq!(tick(1e-7, 1e-6), "1.0e-7");
    }

    #[test]
    fn long_names_lose_their_middle() {
        // An i is 0.42 em of 12.5 pixels, a W one em, the dots 1.1.
        assert_eq!((text_px("iiii"), text_px("WW")), (21, 25));
        assert_eq!(shortened("abcdef", 100), "abcdef");
        assert_eq!(shortened("WabcdefW", 52), "Wa…W");
        assert_eq!(shortened("WabcdefW", 1), "");
    }

    #[test]
    fn axes_have_air_and_keep_to_their_unit() {
        let axis = |unit: Unit, values: &[f64]| {
            let range = unit.axis(values.iter().copied());
            [range.start, range.end]
        };
        // 8 % of the span on either side, a tenth of a flat line's value.
        assert_eq!(axis(Unit::Number, &[0.0, 100.0]), [-8.0, 108.0]);
        assert_eq!(axis(Unit::Number, &[100.0]), [90.0, 110.0]);
        assert_eq!(axis(Unit::PerCent, &[100.0]), [90.0, 100.0]);
        assert_eq!(axis(Unit::PerCent, &[0.0, 0.0]), [0.0, 10.0]);
        assert_eq!(axis(Unit::PerCent, &[50.0, 100.0]), [46.0, 100.0]);
        assert_eq!(axis(Unit::Share, &[0.5, 1.0]), [0.46, 1.0]);
        assert_eq!(axis(Unit::Tokens, &[0.0, 100.0]), [0.0, 108.0]);
        // What cannot be is shown all the same.
        assert_eq!(axis(Unit::PerCent, &[0.0, 500.0]), [0.0, 540.0]);
    }

    #[test]
    fn every_mark_says_its_value() {
        let points: Vec<(f64, f64)> = (1..=5000).map(|x| (f64::from(x), 0.5)).collect();
        let all = [series("KL & co", &[(6.0, -0.02)]), series("long", &points)];
        let of = |series: &[Series], unit| {
            Chart::lines("x", "t", "c", "step", unit, series).unwrap().unwrap().inline()
        };
        let svg = of(&all, Unit::Nats);
        assert!(svg.contains("<title>KL &amp; co, step 6: −0.02000 nats</title>"), "{svg}");
        assert!(svg.contains("<title>long, step 1: 0.5000 nats</title>"));
        // A mark every three pixels at most, whatever the number of points.
        let n_tips = svg.matches("<title>long").count();
        assert!((50..=120).contains(&n_tips), "{n_tips}");
        assert!(of(&all[..1], Unit::PerCent).contains("step 6: −0.02000 %"));
        // A point without a line is a dot that can be seen.
        assert!(of(&all[..1], Unit::Nats).contains("r=\"4\""));
        assert!(!of(&[series("two", &[(1.0, 1.0), (2.0, 2.0)])], Unit::Nats).contains("r=\"4\""));
        let interval = Interval { estimate: 61.0, low: 51.25, high: 70.0 };
        let estimate =
            Estimate { name: "care".to_owned(), colour: Colour(1), interval, reference: None };
        let chart = Chart::estimates("x", "t", "c", Unit::PerCent, &[estimate], None).unwrap();
        let svg = chart.unwrap().standalone();
        assert!(svg.contains("<title>care: 61.00 [51.25, 70.00] %</title>"), "{svg}");
    }

    #[test]
    fn lines_become_paths_in_the_page_s_colours() {
        let points = [(1.0, 0.5), (2.0, f64::NAN), (3.0, -0.5)];
        let all = [series("a<b", &points), series("c", &points)];
        let chart = Chart::lines("x", "A & B", "c", "step", Unit::Number, &all).unwrap().unwrap();
        let svg = chart.inline();
        assert!(svg.contains("<polyline") && svg.contains("var(--s1)"), "{svg}");
        assert!(svg.contains("a&lt;b") && !svg.contains("a<b"), "{svg}");
        assert!(
            svg.contains("aria-label=\"A &amp; B\"") && !svg.contains("width=\"360\""),
            "{svg}"
        );
        assert!(!svg.contains("#A0") && !svg.contains("NaN"), "{svg}");
        assert!(chart.standalone().contains("--s1:#2f7d8c"));
        assert!(
            Chart::lines("x", "t", "c", "step", Unit::Number, &[series("a", &[(1.0, f64::NAN)])])
                .unwrap()
                .is_none()
        );
        // One point, a flat line: still drawable.
        for points in [&[(1.0, 2.0)][..], &[(1.0, 2.0), (2.0, 2.0)]] {
            assert!(
                Chart::lines("x", "t", "c", "step", Unit::Number, &[series("a", points)])
                    .unwrap()
                    .is_some()
            );
        }
    }

    #[test]
    fn estimates_are_drawn_with_names() {
        let estimate = |name: &str, centre: f64| Estimate {
            name: name.to_owned(),
            colour: Colour(0),
            interval: Interval { estimate: centre, low: centre - 0.1, high: centre + 0.1 },
            reference: Some(0.5),
        };
        let all = [estimate("original", 0.4), estimate("final", f64::NAN)];
        let svg = Chart::estimates("x", "t", "c", Unit::Number, &all, Some(0.0))
            .unwrap()
            .unwrap()
            .inline();
        assert!(svg.contains("original") && !svg.contains("final"), "{svg}");
        assert!(Chart::estimates("x", "t", "c", Unit::Number, &[], None).unwrap().is_none());
    }

    #[test]
    fn a_bound_is_dashed_and_not_in_the_legend() {
        let line = series("action", &[(1.0, 60.0), (4.0, 70.0)]);
        let bound = Series::bound("action, longer", Colour(1), 58.0, [1.0, 4.0]);
        let of = |all: &[Series]| {
            Chart::lines("x", "t", "c", "step", Unit::PerCent, all).unwrap().unwrap().inline()
        };
        let svg = of(&[line.clone(), bound]);
        assert_eq!(svg.matches("<title>action, longer: 58.00 %</title>").count(), 2, "{svg}");
        assert!(!svg.contains(">\naction, longer"), "{svg}");
        // Many short strokes instead of one line.
        let strokes = |svg: &str| svg.matches("<polyline").count();
        assert!(strokes(&svg) > strokes(&of(&[line])) + 10, "{svg}");
    }

    #[test]
    fn an_axis_that_counts_nothing_has_numbers_between() {
        let path = series("rollouts", &[(0.0, 0.1), (0.12, 0.3), (0.09, 0.2), (0.09, 0.9)]);
        let svg = Chart::lines("x", "t", "c", "KL", Unit::Number, &[path]).unwrap().unwrap();
        let svg = svg.inline();
        assert!(svg.contains("0.05") && svg.contains("0.10"), "{svg}");
        // Points above one another each say their value.
        assert!(svg.contains("KL 0.09000: 0.2000") && svg.contains("KL 0.09000: 0.9000"), "{svg}");
    }

    #[test]
    fn drawings_hold_no_secrets() {
        redact::hide("drawn-secret-0");
        let name = "http://u:pw@host drawn-secret-0 & co";
        let chart =
            Chart::lines("x", name, name, "step", Unit::Number, &[series(name, &[(1.0, 1.0)])]);
        let chart = chart.unwrap().unwrap();
        for text in [&chart.inline(), &chart.standalone(), &chart.caption] {
            assert!(!text.contains("pw@") && !text.contains("drawn-secret"), "{text}");
        }
    }
}
