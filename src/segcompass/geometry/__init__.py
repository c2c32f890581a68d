"""The sole owner of resizing, padding and coordinate changes.

Three frames exist besides the image itself. The *segmenter's frame* is a square of ``side`` px that
holds the image scaled so that its longest side fits, in the top left corner, with padding to the
right and below (SAM's convention), or stretched over the whole of it (SAM 2's). The *policy's
frame* is either the whole image (Qwen2.5-VL) or the image centred on a square (LLaVA-1.5). The
*canvas* is the policy's frame as a square of its own scale: coordinates in answers are px of it.

Points are (x, y) and boxes (x0, y0, x1, y1), in px, continuous: pixel i covers [i, i + 1).
"""

from segcompass.geometry.coordinates import Canvas as Canvas
from segcompass.geometry.coordinates import Fit as Fit
from segcompass.geometry.coordinates import Frame as Frame
from segcompass.geometry.coordinates import boxes_to_frame as boxes_to_frame
from segcompass.geometry.coordinates import boxes_to_image as boxes_to_image
from segcompass.geometry.coordinates import points_to_frame as points_to_frame
from segcompass.geometry.coordinates import points_to_image as points_to_image
from segcompass.geometry.coordinates import square_offsets as square_offsets
from segcompass.geometry.coordinates import token_boxes as token_boxes
from segcompass.geometry.resampling import masks_to_grid as masks_to_grid
from segcompass.geometry.resampling import masks_to_image as masks_to_image
from segcompass.geometry.resampling import pad_to_square as pad_to_square
from segcompass.geometry.resampling import padding_mask as padding_mask
from segcompass.geometry.resampling import shrink as shrink
from segcompass.geometry.resampling import stretch as stretch
from segcompass.geometry.resampling import to_frame as to_frame
