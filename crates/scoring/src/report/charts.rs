//! Charts as SVG: lines over steps, and estimates with their intervals.
//!
//! Drawn with plotters in placeholder colours, which become CSS variables afterwards, so that one drawing fits light and
//! dark pages. A chart for a file of its own carries the variables' values itself.

use arete_records::stats::Interval;
use plotters::coord::Shift;
use plotters::prelude::*;

use crate::Error;

/// Drawing size, in pixels; scaled by the page.
const SIZE: (u32, u32) = (360, 236);
const INK: RGBColor = RGBColor(0x10, 0x10, 0x11);
const FAINT: RGBColor = RGBColor(0xE0, 0xE0, 0xE1);
/// plotters divides by 1.24 what it is given.
const FONT_PX: f64 = 12.5 * 1.24;

/// A colour of the page's palette: 0 to 8; the first three are those of original, SFT and final model, the next three
/// those of the aspects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Colour(pub u8);

impl Colour {
    const COUNT: u8 = 9;

    fn placeholder(self) -> RGBColor {
        RGBColor(0xA0, 0x00, self.0 % Self::COUNT + 1)
    }
}

/// A named line.
#[derive(Clone, Debug)]
pub struct Series {
    /// What the legend says.
    pub name: String,
    /// Its colour.
    pub colour: Colour,
    /// In order of x.
    pub points: Vec<(f64, f64)>,
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
    /// The drawing with CSS variables for colours, as plotters writes it.
    svg: String,
}

impl Chart {
    /// Lines over steps; none if no series has a point.
    ///
    /// # Errors
    ///
    /// [`Error::Chart`] if plotters refuses.
    pub fn lines(
        name: &str,
        title: &str,
        caption: &str,
        x_label: &str,
        series: &[Series],
    ) -> Result<Option<Self>, Error> {
        let series: Vec<Series> = series.iter().filter_map(finite).collect();
        if series.is_empty() {
            return Ok(None);
        }
        let svg = draw(name, |area| lines(area, x_label, &series))?;
        Ok(Some(Self::new(name, title, caption, &svg)))
    }

    /// Estimates with their intervals, one below the other; a dashed line at `zero` if it is given. None without
    /// estimates.
    ///
    /// # Errors
    ///
    /// [`Error::Chart`] if plotters refuses.
    pub fn estimates(
        name: &str,
        title: &str,
        caption: &str,
        estimates: &[Estimate],
        zero: Option<f64>,
    ) -> Result<Option<Self>, Error> {
        let usable = |e: &&Estimate| {
            [e.interval.estimate, e.interval.low, e.interval.high].iter().all(|x| x.is_finite())
        };
        let estimates: Vec<Estimate> = estimates.iter().filter(usable).cloned().collect();
        if estimates.is_empty() {
            return Ok(None);
        }
        let svg = draw(name, |area| dots(area, &estimates, zero))?;
        Ok(Some(Self::new(name, title, caption, &svg)))
    }

    fn new(name: &str, title: &str, caption: &str, svg: &str) -> Self {
        let mut svg = svg
            .replace(&hex(INK), "var(--dim)")
            .replace(&hex(FAINT), "var(--line)")
            .replace("font-family=\"sans-serif\"", "font-family=\"inherit\"");
        for index in 0..Colour::COUNT {
            svg = svg.replace(&hex(Colour(index).placeholder()), &format!("var(--s{index})"));
        }
        let [name, title, caption] = [name, title, caption].map(str::to_owned);
        Self { name, title, caption, svg }
    }

    /// The drawing as part of a page that defines the colours.
    pub fn inline(&self) -> String {
        let (width, height) = SIZE;
        let label = super::html::escape(&self.title);
        self.svg.replacen(
            &format!("width=\"{width}\" height=\"{height}\""),
            &format!("role=\"img\" aria-label=\"{label}\""),
            1,
        )
    }

    /// The drawing as a file of its own.
    pub fn standalone(&self) -> String {
        let style = "<style>svg{--dim:#5f5a52;--line:#dfdbd3;--s0:#7d8590;--s1:#2f7d8c;--s2:#b4552d;--s3:#6a5aa8;\
                     --s4:#6d8a34;--s5:#b0862a;--s6:#a8527c;--s7:#3f6fb0;--s8:#7a6248;font-family:system-ui,sans-serif;background:#fdfcfa}\
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

/// The series without points that are not finite; none if nothing is left.
fn finite(series: &Series) -> Option<Series> {
    let mut series = series.clone();
    series.points.retain(|(x, y)| x.is_finite() && y.is_finite());
    (!series.points.is_empty()).then_some(series)
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type DrawResult = Result<(), Box<dyn std::error::Error>>;

fn draw(name: &str, content: impl FnOnce(&Area<'_>) -> DrawResult) -> Result<String, Error> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        content(&area)
            .and_then(|()| Ok(area.present()?))
            .map_err(|error| Error::Chart { name: name.to_owned(), reason: error.to_string() })?;
    }
    Ok(svg)
}

fn text_style(colour: RGBColor) -> TextStyle<'static> {
    ("sans-serif", FONT_PX).into_font().color(&colour)
}

/// The range of values with a little air; never empty.
fn range(values: impl Iterator<Item = f64> + Clone) -> std::ops::Range<f64> {
    let low = values.clone().fold(f64::INFINITY, f64::min);
    let high = values.fold(f64::NEG_INFINITY, f64::max);
    let air = if high > low { 0.08 * (high - low) } else { 0.1 * high.abs().max(0.1) };
    low - air..high + air
}

/// A number with as many digits as the span of its axis asks for.
fn tick(value: f64, span: f64) -> String {
    let digits =
        if span >= 20.0 { 0 } else { (1.3 - span.log10()).ceil().clamp(0.0, 8.0) as usize };
    if value != 0.0 && (span < 1e-5 || value.abs() >= 1e6) {
        return format!("{value:.1e}");
    }
    let text = format!("{value:.digits$}");
    match text.strip_prefix('-') {
        Some(rest) if rest.chars().any(|c| matches!(c, '1'..='9')) => format!("−{rest}"),
        Some(rest) => rest.to_owned(),
        None => text,
    }
}

fn lines(area: &Area<'_>, x_label: &str, series: &[Series]) -> DrawResult {
    let all = || series.iter().flat_map(|series| series.points.iter().copied());
    let (low, high) = all()
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), (x, _)| (low.min(x), high.max(x)));
    let x_range = if high > low { low..high } else { low - 0.5..high + 0.5 };
    let y_range = range(all().map(|(_, y)| y));
    let y_span = y_range.end - y_range.start;
    let x_span = x_range.end - x_range.start;
    let n_x_labels = (x_span.round() as usize + 1).clamp(2, 6);

    legend(area, series)?;
    let mut chart = ChartBuilder::on(area)
        .margin_top(if series.len() > 1 { 30 } else { 8 })
        .margin_right(14)
        .margin_bottom(2)
        .x_label_area_size(38)
        .y_label_area_size(54)
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
        .x_label_formatter(&|x| {
            if x.fract().abs() < 1e-9 { tick(*x, 1000.0) } else { String::new() }
        })
        .y_label_formatter(&|y| tick(*y, y_span))
        .draw()?;
    for series in series {
        let colour = series.colour.placeholder();
        chart
            .draw_series(LineSeries::new(series.points.iter().copied(), colour.stroke_width(2)))?;
        if series.points.len() <= 40 {
            let dot = |&point| Circle::new(point, 2, colour.filled());
            chart.draw_series(series.points.iter().map(dot))?;
        }
    }
    Ok(())
}

/// Names and colours in a row above the chart, if there is more than one.
fn legend(area: &Area<'_>, series: &[Series]) -> DrawResult {
    if series.len() < 2 {
        return Ok(());
    }
    let mut x = 8;
    for series in series {
        let colour = series.colour.placeholder();
        area.draw(&PathElement::new([(x, 15), (x + 16, 15)], colour.stroke_width(3)))?;
        area.draw(&Text::new(series.name.clone(), (x + 21, 8), text_style(INK)))?;
        x += 21 + 7 * i32::try_from(series.name.chars().count()).unwrap_or(20) + 14;
    }
    Ok(())
}

fn dots(area: &Area<'_>, estimates: &[Estimate], zero: Option<f64>) -> DrawResult {
    let ends = estimates.iter().flat_map(|e| {
        let Interval { estimate, low, high } = e.interval;
        [estimate, low, high].into_iter().chain(e.reference).chain(zero)
    });
    let x_range = range(ends.collect::<Vec<f64>>().into_iter());
    let span = x_range.end - x_range.start;
    let n = estimates.len() as f64;
    let longest = estimates.iter().map(|e| e.name.chars().count()).max().unwrap_or(0);
    let label_width = (7 * longest + 14).min(180) as u32;
    let mut chart = ChartBuilder::on(area)
        .margin_top(8)
        .margin_right(18)
        .margin_bottom(2)
        .margin_left(label_width)
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
        area.draw(&Text::new(estimate.name.clone(), (2, pixel - 8), text_style(INK)))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(name: &str, points: &[(f64, f64)]) -> Series {
        Series { name: name.to_owned(), colour: Colour(1), points: points.to_vec() }
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
    fn lines_become_paths_in_the_page_s_colours() {
        let points = [(1.0, 0.5), (2.0, f64::NAN), (3.0, -0.5)];
        let all = [series("a<b", &points), series("c", &points)];
        let chart = Chart::lines("x", "A & B", "c", "step", &all).unwrap().unwrap();
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
            Chart::lines("x", "t", "c", "step", &[series("a", &[(1.0, f64::NAN)])])
                .unwrap()
                .is_none()
        );
        // One point, a flat line: still drawable.
        for points in [&[(1.0, 2.0)][..], &[(1.0, 2.0), (2.0, 2.0)]] {
            assert!(Chart::lines("x", "t", "c", "step", &[series("a", points)]).unwrap().is_some());
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
        let svg = Chart::estimates("x", "t", "c", &all, Some(0.0)).unwrap().unwrap().inline();
        assert!(svg.contains("original") && !svg.contains("final"), "{svg}");
        assert!(Chart::estimates("x", "t", "c", &[], None).unwrap().is_none());
    }
}
