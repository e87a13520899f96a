//! Points with an interval on either axis, and the line through those that no other beats.

use anyhow::Result;
use arete_records::stats::Interval;
use plotters::prelude::*;

use super::{
    Area, Chart, Colour, DrawResult, FAINT, HEIGHT, INK, LINE_PX, Legend, Series, Tip, Unit, draw,
    hover_value, shown, text_style, tick,
};

/// A named point with its intervals.
#[derive(Clone, Debug)]
pub struct Cross {
    /// What the legend says.
    pub name: String,
    /// Its colour.
    pub colour: Colour,
    /// On either axis.
    pub at: [Interval; 2],
    /// Whether the line goes through it.
    pub on_line: bool,
}

impl Chart {
    /// Points with their intervals, and a line through some of them in the order of x; dashed lines at 0. None without points.
    ///
    /// # Errors
    ///
    /// The drawing library's failure if plotters refuses.
    pub fn crosses(
        name: &str,
        title: &str,
        caption: &str,
        labels: [&str; 2],
        crosses: &[Cross],
    ) -> Result<Option<Self>> {
        let is_finite = |cross: &&Cross| {
            let of = |own: &Interval| [own.estimate, own.low, own.high];
            cross.at.iter().flat_map(of).all(f64::is_finite)
        };
        let mut crosses: Vec<Cross> = crosses
            .iter()
            .filter(is_finite)
            .map(|own| Cross { name: shown(&own.name), ..own.clone() })
            .collect();
        if crosses.is_empty() {
            return Ok(None);
        }
        crosses.sort_by(|a, b| a.at[0].estimate.total_cmp(&b.at[0].estimate));
        let named = |own: &Cross| Series::new(own.name.clone(), own.colour, Vec::new());
        let legend = Legend::of(&crosses.iter().map(named).collect::<Vec<_>>());
        let height = HEIGHT + 40 + legend.height - legend.height.min(LINE_PX);
        let svg = draw(name, height, |area| crossed(area, labels, &crosses, &legend))?;
        Ok(Some(Self::new(name, title, caption, svg)))
    }
}

fn crossed(
    area: &Area<'_>,
    [x_label, y_label]: [&str; 2],
    crosses: &[Cross],
    legend: &Legend,
) -> DrawResult<Vec<Tip>> {
    let range = |axis: usize| {
        let ends = crosses.iter().flat_map(move |own| [own.at[axis].low, own.at[axis].high, 0.0]);
        Unit::Number.axis(ends.collect::<Vec<f64>>().into_iter())
    };
    let (x_range, y_range) = (range(0), range(1));
    let [x_span, y_span] = [&x_range, &y_range].map(|range| range.end - range.start);
    legend.draw(area)?;
    let mut chart = ChartBuilder::on(area)
        .margin_top(legend.height + if legend.height > 0 { 12 } else { 8 })
        .margin_right(14)
        .margin_bottom(2)
        .x_label_area_size(38)
        .y_label_area_size(64)
        .build_cartesian_2d(x_range.clone(), y_range.clone())?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(FAINT)
        .axis_style(FAINT)
        .x_labels(5)
        .y_labels(5)
        .x_desc(x_label)
        .y_desc(y_label)
        .label_style(text_style(INK))
        .axis_desc_style(text_style(INK))
        .x_label_formatter(&|x| tick(*x, x_span))
        .y_label_formatter(&|y| tick(*y, y_span))
        .draw()?;
    let none = INK.stroke_width(1);
    let zeros =
        [[(0.0, y_range.start), (0.0, y_range.end)], [(x_range.start, 0.0), (x_range.end, 0.0)]];
    for zero in zeros {
        chart.draw_series(DashedLineSeries::new(zero, 4, 4, none))?;
    }
    let line = crosses.iter().filter(|own| own.on_line);
    let line = line.map(|own| (own.at[0].estimate, own.at[1].estimate));
    chart.draw_series(LineSeries::new(line, INK.stroke_width(2)))?;
    let mut tips = Vec::new();
    for own in crosses {
        let colour = own.colour.placeholder();
        let [x, y] = own.at;
        let centre = (x.estimate, y.estimate);
        let bars = [
            [(x.low, y.estimate), (x.high, y.estimate)],
            [(x.estimate, y.low), (x.estimate, y.high)],
        ];
        chart.draw_series(bars.map(|bar| PathElement::new(bar, colour.stroke_width(2))))?;
        chart.draw_series([Circle::new(centre, 5, colour.filled())])?;
        let told = |label: &str, own: &Interval| {
            let [at, low, high] = [own.estimate, own.low, own.high];
            let [at, low, high] = [at, low, high].map(|value| hover_value(value, Unit::Number));
            format!("{label} {at} [{low}, {high}]")
        };
        let text = format!("{}: {}, {}", own.name, told(x_label, &x), told(y_label, &y));
        tips.push(Tip { at: chart.backend_coord(&centre), text });
    }
    Ok(tips)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_point_has_a_bar_on_either_axis_and_says_its_values() {
        let of = |at: f64| Interval { estimate: at, low: at - 0.5, high: at + 0.5 };
        let cross = |name: &str, [x, y]: [f64; 2], on_line| Cross {
            name: name.to_owned(),
            colour: Colour(2),
            at: [of(x), of(y)],
            on_line,
        };
        let all = [
            cross("a & b", [1.0, 0.0], true),
            cross("c", [0.0, 1.0], true),
            cross("no number", [f64::NAN, 1.0], false),
        ];
        let labels = ["honesty", "respect"];
        let svg = Chart::crosses("front", "t", "c", labels, &all).unwrap().unwrap().inline();
        let tip = "<title>a &amp; b: honesty 1.000 [0.5000, 1.500], respect 0.000 [−0.5000, 0.5000]</title>";
        assert!(svg.contains(tip), "{svg}");
        assert!(svg.contains(">honesty<") || svg.contains("honesty\n"), "{svg}");
        assert!(!svg.contains("no number") && !svg.contains("NaN"), "{svg}");
        assert!(Chart::crosses("front", "t", "c", labels, &all[2..]).unwrap().is_none());
    }
}
