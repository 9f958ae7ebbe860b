"""Texts and style of the page."""

INTRO = """# EVATok: videos as few tokens as they need

A router gives each part of a clip its own number of tokens, more where more happens. {models}.
"""

ABOUT = """## What this is

[EVATok](https://arxiv.org/abs/2603.12267) takes a video to discrete tokens of adaptive length. A clip of
{config.num_frames} frames has {config.num_blocks} temporal blocks; a router looks at the clip once and gives each
block one of {lengths} tokens. A decoder makes the video from these tokens alone, and a language model over them makes
new videos, or continues one. "Fixed length" here means {fixed} tokens for every block, the counterpart
of the baseline of the paper.

This app is made with `evatok_hf`, an independent implementation: not the authors'
code, and none of their weights. `evatok demo` starts the same app on a machine of your own. The tokens that can be
downloaded here are what `VideoTokens.load` reads and `evatok decode` turns back into a video, with the same checkpoint.

## Limits

- Videos are cut to a square in their middle and brought to {config.image_size} x {config.image_size} pixels, sound is
  dropped. `{checkpoint}` decides how sharp they can be at all; the bundled checkpoints are small, and their pictures
  are blurred.
- Fewer tokens than a fixed length says nothing about equal quality; "Measure the fixed length, too" shows both.
- The generator knows the classes in its list and nothing else, and a prediction is one of many possible ones.
- Videos of up to {limits.seconds:g} seconds, {limits.frames} frames, {limits.side} pixels a side,
  {limits.megapixels} megapixels in all and {limits.megabytes} MB are taken; longer ones are refused, not cut.
- Your browser may not play what can be read here (AVI, for one): it says so, and the buttons work all the same.

## What happens to uploads

They are decoded in a process of their own, are seen by nobody else, and are deleted within the hour, like the results.
Nothing is counted or sent elsewhere.
"""

CSS = """
.gradio-container { max-width: 1200px !important; width: 100%; margin-inline: auto !important; }
.summary .headline { font-size: 1.15rem; margin: 0 0 0.5rem; }
.summary .note { color: var(--body-text-color-subdued); font-size: 0.875rem; margin: 0.5rem 0 0; }
.summary table.numbers {
  border: 0 !important; border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums;
}
.summary table.numbers tr, .summary table.numbers thead { border: 0 !important; }
.summary table.numbers caption { text-align: left; font-weight: 600; padding-bottom: 0.25rem; }
.summary table.numbers th, .summary table.numbers td {
  border: 0 !important; border-bottom: 1px solid var(--border-color-primary) !important;
  padding: 0.3rem 0.75rem 0.3rem 0 !important; text-align: left;
}
/* the label above what is shown, not over its upper edge */
.result [data-testid="block-label"] { position: static; border: 0; }
/* its cutting tool would be fetched from another server */
button[aria-label="Trim video to selection"], button[aria-label="Reset video to initial value"] { display: none; }
/* that the browser cannot play an upload is in a message already; here it would only cover the way to remove it */
.upload [data-testid="status-tracker"] { display: none !important; }
@media (max-width: 640px) {
  /* all tabs in sight, wide pictures large enough to read */
  .tab-container button { padding-inline: 0.5rem !important; font-size: 0.875rem !important; }
  .picture .image-frame { display: block; overflow-x: auto; }  /* not centred: the left part could not be scrolled to */
  .picture .image-frame img { width: 860px; max-width: none; }
}
:focus-visible { outline: 2px solid var(--color-accent) !important; outline-offset: 2px; }
"""
