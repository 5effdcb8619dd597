"""What a completion states in words, with more than the answer, or with a name or a condition: the value is read where
exactly one is stated, and never where the words deny it or could mean another number. The kinds are those of the public
trials in ../shared/trials/cases.jsonl, which are run too where they are there."""

import json
import re
from pathlib import Path

import pytest

from support.answers import ANSWER_FORMATS, extract_answer, is_correct, lenient_correct, same_answer

CASES = Path(__file__).parents[2] / "shared" / "trials" / "cases.jsonl"
FRAMES = {"phrase": "The answer is {}.", "hash": "3 + 4\n#### {}", "tags": "<think>3 + 4</think><answer>{}</answer>"}


def states(response, reference, fmt="any"):
    stated = extract_answer(response, fmt)
    return stated is not None and same_answer(stated, reference)


# --- statements that hold more than the answer ------------------------------------------------------------------------

IN_WORDS = {  # value: wordings, each of them after "The answer is", after "####" and between tags
    "120": [
        "The volume of the box is 120. I hope it is correct",
        "The volume of ABCDEFGH is 120. I hope it is correct",
        "The volume of $ABCDEFGH$ is 120. I hope it is correct", "120 cubic centimeters (5 x 6 x 4)",
        "The volume is 120 cubic units", "The volume is $120$ cubic units. I hope it is correct",
        "The box has a volume of 120", "The volume of the box (in cubic cm) is 120",
        "120 cm^3, because 4*5*6 = 120", r"$120\text{ cm}^3$, because $4\cdot5\cdot6=120$",
        "the volume is 120 cubic centimeters", "Volume = 4 × 5 × 6 = 120", "The rectangular prism's volume is 120",
        "that the volume equals 120", "the volume of the box is equal to 120", "120; the volume of the box",
        "120 (cubic units)", "120 cubic units (since 4x5x6=120)",
    ],
    "3": [
        "Ann began 3 hours ago", "Jane started growing Sphere 3 hours ago. I hope it is correct",
        "It was 3 hours ago", "3 hours ago", "Ann started 3 hours before Bob", "3 hours",
    ],
    "34": ["The largest n is 34", "The largest $n$ is 34"],
    "19": ["The maximum number of points that could be in the domain of $f(x)$ is 19"],
    "7": [
        "7, because 3+4=7", "7 because 3+4=7", "7, since 3 + 4 = 7", "7 since 3 + 4 = 7", "7, as 3 + 4 = 7",
        "7 (3 + 4 = 7)", "7 (since 3 + 4 = 7)", "7 (3+4)", "7 - because 3 + 4 = 7", "7 — because 3 + 4 = 7",
        "7; this follows from 3 + 4 = 7", "7, which is 3 + 4", "7, which is the sum of 3 and 4",
        "7, so Tom has 7 apples", "7, so Tom has seven apples", "$x = 7$, so Tom has 7 apples",
        "$7$, so Tom has 7 apples", "$7$ because $3+4=7$", "exactly 7!", "clearly 7", "definitely 7",
        "of course 7", "for sure 7", "that Tom has 7 apples", "Tom has 7 apples", "Tom has 7 apples left",
        "Tom has 7 apples left at the end of the day", "7 apples, because 3+4=7", "7 apples (3 + 4)",
        "7 hours, which equals 420 minutes / 60", r"\(7\), because \(3+4=7\)", "**7**, because 3+4=7",
        "**7** apples", "**7** because 3+4=7", "**Tom has 7 apples.**", "7. Therefore Tom has 7 apples",
        "3 + 4 = 7 apples", "3 + 4 = 7, so he has 7 apples", "$3 + 4 = 7$", "Mr. Smith has 7 apples",
        "7 is the smallest such integer", "7, thus Tom has 7 apples", "7, hence the number of apples is 7",
        "7 and we are done", "7 as 3+4=7", "7 apples for each child", "7 for every child in the class",
        "7, I think", "7, as we have shown", "7, obtained by adding 3 and 4", "7, found by 3+4=7", "7: 3 + 4 = 7",
        "7 [3 + 4]", "7 = 3 + 4", "7 apples and that is final", "7 whole apples", "7 apples in total",
        "7 apples altogether", "7 apples, which is 3 + 4", "a total of 7 apples", "the number 7", "the integer 7",
        "$7$ apples", "$7$, because $3+4=7$", "7 since the sum of 3 and 4 is 7",
        "7 because the sum of 3 and 4 is 7, not 8", "7, rather than 8", "7 instead of 8",
        "7 due to the sum being 3 + 4", "7, where 7 = 3 + 4", "indeed 7, because 3+4=7", r"$\text{7 apples}$",
        "7 apples (3 red and 4 green)", "Tom now has 7 apples", "Tom would have 7 apples",
        "Tom should have 7 apples", "Tom and Ann have 7 apples together", "Tom and Ann together have 7 apples",
        "He has 7 left", "7 are left", "7 apples are left", "7 apples remain", "There'll be 7 apples",
        "There would be 7 apples left", "That makes 7", "That's 7 apples", "It's 7", "it is 7", "Yes, it is 7",
        "So, 7", "So it's 7 apples", "We get 7", "We have x = 7", "We have $x = 7$", "Hence $x=7$",
        "Thus x equals 7", "x equals 7", "x is 7", "the value of x is 7", "the solution is x = 7",
        "The solution is $x = 7$", "The only solution is $x = 7$", "The smallest positive integer is 7",
        r"the smallest possible value is $\boxed{7}$", "The missing number is 7", "the number is 7",
        "7 days later", r"The final answer is \boxed{7}", r"Final Answer: $\boxed{7}$", "The answer: 7",
        "The answer is $7$ apples", "So the answer is: 7", "Therefore the answer is 7", "Answer: $7",
        "Answer: **7**", "Answer: 7 apples", "Answer: Tom has 7 apples", r"Answer: \(7\)", "My answer: 7",
        "Final: 7", "Result: 7", "**Answer: 7**", "ANSWER IS 7", "__7__", "_7_", "_7_ apples", "__$7$__",
        r"__\(7\)__", "__x = 7__", "_Tom has 7 apples._", "Tom has __7__ apples", "Tom has **7** apples",
        "Tom has _7_ apples",
    ],
    "1/2": [
        r"$\frac{1}{2}$, because half of the marbles are red", "1/2, because half are red", "1/2 (or 0.5)",
        "1/2 = 0.5", "The probability is 1/2", r"the fraction is $\frac12$", r"the ratio is $\frac{1}{2}$",
        r"$P = \frac{1}{2}$", r"The probability of heads is $\frac{1}{2}$, since the coin is fair",
        r"the slope is $\frac{1}{2}$", r"\(\frac{1}{2}\), because the coin is fair", "1/2 of the cake",
    ],
    "D": [
        "for sure D, it can't be A or B", "D, because A and B are too small", "D because A and B are too small",
        "(D), since the others are negative", "option D, since the others are negative", "D. It can't be A or B",
        "D: it is the only positive one", "(D), because the rest are negative",
        "(D) because the rest are negative", "option (D)", "choice D", "D. The rest are negative",
        "**D**, because A is negative", "D) 42", "(D) 42", "D – it is the largest", "The correct option is D",
        "The correct choice is (D)", "It is D", "D because of symmetry", "D, it can't be anything else",
        "definitely D", "D, not A", "D, no other option fits",
    ],
    "18": [
        "She makes $18 every day at the farmers' market", "Janet makes $18 every day at the farmers' market",
        "Janet makes 18 dollars every day at the farmers' market", "Total cost: $18",
        "18 dollars is what she makes", "18 dollars, as she sells 9 eggs for 2 dollars each", "18, i.e. 9 * 2",
        "18, that is, 9 * 2", "18 (dollars)", "18 (9 eggs * $2)", "18 dollars (9 * $2 per egg)",
        "18 because 9*2=18", "18, because 9*2=18", "18 since 9*2=18", "18 dollars per day",
        "$18 per day, that is 9*2", "18. She makes $18 a day", "18. She sells 9 eggs for $2 each",
        "Janet makes $18 every day", "Janet makes 18 dollars every day", "The answer is 18",
        "The final answer is $18", "So the answer is 18 dollars", "9 * 2 = 18", "9 * 2 = $18", "$9 * 2 = 18",
        "= 18", "Total: 18", "Total = 18", "total is 18", "18 [dollars]", "18 - dollars", "18 -- because 9*2",
        "18 eggs were sold at the market today", "**18** dollars", "**18 dollars**", "18 dollars!",
        "$18.00 (18 dollars)", "x = 18", "18 (approximately)", "approximately 18", "18 in total",
        "a total of 18 dollars", "A total of 18 dollars", "it is 18", "She has 18 left",
        "18, so Janet makes $18 every day", "18 (16 - 3 - 4 = 9, 9 * 2 = 18)",
        "Janet makes $18 at the farmers' market every day", "She will earn $18", "She earns 18 dollars daily",
        "Janet earns $18 per day", "$18 is what Janet makes", "Her daily income is $18",
        r"Janet's daily income is \$18", "Janet makes 9 * 2 = $18 every day",
        "Janet makes 9 * 2 = 18 dollars every day", "Every day Janet makes $18", "Each day, Janet makes $18",
        "Per day, that's $18", "They cost $18 altogether", "It costs $18 in total", "He spent $18 on the shirts",
        "He paid $18 for the shirts", "$18, since she sells 9 eggs at $2 each",
        "$18 because she sells 9 eggs at $2 each", "$18. She sells 9 eggs at $2 each", "$18 (9 eggs at $2 each)",
        r"\$18 per day", "$18 a day", "18 dollars a day", "18 dollars", "$18/day", "$18 / day", "18$", "18 USD",
        "18.00", "$ 18", "18 (USD)", "18 (eighteen)", "18 (9*2=18)", "18 (= 9 * 2)", "18 [9 * 2 = 18]",
        "18 = 9 * 2", "18, since 9*2=18", "18 as 9*2=18", "18, i.e., 9*2", "18: 9*2", "18; 9*2=18", "18 eggs",
        "18 eggs left", "18 eggs per day", "Janet earns $18", "$18 every day at the farmers' market",
        "The total is 18", "The total is $18", "Total: $18", "Total = $18", "total: 18 dollars", "x=18",
        "$x = 18$", r"\$18", r"$\$18$", r"\(18\)", r"\[18\]", "`18`", "**$18**", "~18~", "18.  ", "18",
        "18 (2 * 9 = 18), which is her daily income", "18, Janet makes $18", "18 and this is the amount she makes",
    ],
    "12": [
        "There are 12 distinct arithmetic sequences that meet the conditions", "The 5th term is 12",
        "Tom is 12 years old", "Tom ran a total of 12 miles", "x + y = 12", "$x + y = 12$",
        "The value of $x + y$ is $12$", "There are 12 such sequences", "12 distinct sequences",
        "There are a total of 12 sequences", "A total of 12 sequences are possible",
        "the number of such sequences is 12", "We conclude that there are 12 sequences",
        "Therefore there are exactly 12 sequences", "that there are 12 of them", "12 ways",
        "12 different ways to arrange the books", "We find that $n = 12$", "Thus, $n = 12$",
        "So the final answer is 12", "The least common multiple of 4 and 6 is 12", "The sum of 5 and 7 is 12",
    ],
    "5": ["It takes Tom 5 hours to finish", "It will take him 5 hours", "x = 5, because 2x = 10"],
    "2, 3": ["The roots are 2 and 3", "The solutions are $x = 2$ and $x = 3$", "The solution set is {2, 3}",
             "x is 2 or 3"],
    "35": ["In 5 days, Tom saves 35 dollars"],
    "4": ["After giving 3 apples to Bob, Tom has 4 apples left", "The square root of 16 is 4"],
    "45": ["Therefore, the total cost is $45"],
    "45.5": ["The total cost is $45.50"],
    "1250": ["The total cost is $1,250"],
    "3/8": [
        r"The probability is $\frac{3}{8}$", "The probability is 3/8", "The probability that both are red is 3/8",
    ],
    r"9\pi": [r"The area of the circle is $9\pi$ square units"],
    "55": ["The sum of the first 10 terms is 55"],
    "6": ["The price of 3 apples is $6", "The greatest common divisor of 12 and 18 is 6"],
    "(3,4)": ["The center of the circle is $(3, 4)$", "The center of the circle is (3, 4)"],
    "-3": [
        "The value of $x$ is $-3$", "The value of x is -3", "-3, because 4-7=-3", "$-3$ because $4-7=-3$",
        "The temperature is -3 degrees", r"The temperature is $-3^\circ$C", "-3 (4 - 7)", "-3, as 4 - 7 = -3",
        "The sum is −3", "−3, since 4−7=−3",
    ],
    "[-36,104]": [r"The interval is \([-36, 104]\)", r"The interval is \(\boxed{[-36, 104]}\)"],
    "25": ["25%, since 1 out of 4 is red", "25 percent because one in four is red"],
    "60": ["60 miles per hour, because 120/2 = 60"],
    "42": ["42, not 41"],
    "3.5": ["3.5, given that the sides are equal"],
    "-4": ["-4, because 3 - 7 = -4"],
    "yes": ["yes, because 7 is prime"],
    "Monday": ["Monday, since 3 days later it is Monday"],
    "24": ["The perimeter equals 24 cm", "the perimeter = 24 cm"],
    "15": ["the remaining distance is 15 km, so they need 15 km more", "15 km (kilometers)"],
    "540": ["540 (which is 180 * 3)"],
    "1800": ["1,800 (18 * 100)"],
    "-5": ["-5 (below zero)"],
    "5/6": ["5/6 (five sixths)"],
    "x^2+1": [
        "$x^2+1$, because the remainder vanishes", "x^2+1 because the remainder vanishes",
        "$f(x) = x^2+1$, since f is even", "the polynomial is $x^2 + 1$", "The polynomial is x^2 + 1",
    ],
    "(1,2)": [
        "(1, 2), because both equations hold", "$(1,2)$ since both hold", "The solution is $(x, y) = (1, 2)$",
        "the point is (1, 2)", "They intersect at the point $(1,2)$",
    ],
    r"\frac{\pi}{6}+2k\pi \text{ for all } k\in\mathbb{Z}": [
        r"$\frac{\pi}{6}+2k\pi$ where $k$ is an integer", r"$x = \frac{\pi}{6}+2k\pi$, $k \in \mathbb{Z}$",
        r"$x = \frac{\pi}{6}+2k\pi$ for any integer $k$", r"$\frac{\pi}{6}+2k\pi$ for $k \in \mathbb{Z}$",
    ],
    r"(-\infty,3)\cup(5,\infty)": ["(-infinity, 3) U (5, infinity)"],
    r"\infty": ["positive infinity"],
}


@pytest.mark.parametrize("reference, wording", [(value, w) for value in IN_WORDS for w in IN_WORDS[value]])
def test_the_only_value_is_read(reference, wording):
    for fmt, frame in FRAMES.items():
        response = frame.replace("{}", wording)
        assert states(response, reference, fmt) and states(response, reference), (response, extract_answer(response))
        assert lenient_correct(response, reference)


NO_VALUE = [  # neither of the numbers a and b is stated
    "{a} or {b}", "either {a} or {b}", "{a}, or {b}", "{a} or maybe {b}", "not {a}", "not {a}, {b}x",
    "between {a} and {b}", "from {a} to {b}", "{a} to {b}", "{a} apples and {b} pears", "{a} apples, {b} pears",
    "{a} less than {b}", "{a} more than {b}", "{a} fewer than {b}", "{a} times {b}", "{a} plus {b}",
    "{b} minus {a}", "{a} divided by {b}", "{a} out of {b}", "{a} of {b}", "{a} in {b}", "{a} per {b} days",
    "{a}% of {b}", "{a} percent of {b}", "{a} squared", "{a} cubed", "{a} factorial", "{a} dozen", "{a} hundred",
    "{a} thousand", "{a} million", "twice {a}", "half of {a}", "double {a}", "triple {a}", "a third of {a}",
    "a quarter of {a}", "the square root of {a}", "the square of {a}", "the cube of {a}", "minus {a}",
    "negative {a}", "at least {a}", "at most {a}", "more than {a}", "less than {a}", "fewer than {a}",
    "greater than {a}", "over {a}", "under {a}", "above {a}", "below {a}", "up to {a}", "nearly {a}", "almost {a}",
    "about {a} or {b}", "around {a} to {b}", "approximately {a} or {b}", "neither {a} nor {b}", "{a} if x is {b}",
    "{a} unless it rains", "{a}, unless it is {b}", "{a} but not {b}x or", "{a} or more", "{a} or less",
    "{a} or so", "{a} and {b}", "{a}, {b}", "{a}, {b} and 5", "{a}; {b}", "{a} / {b} / 5", "{a} hours {b} minutes",
    "{a} hours and {b} minutes", "{a} feet {b} inches", "{a} dollars and {b} cents", "{a} remainder {b}",
    "{a} with remainder {b}", "{a} r {b}", "{a} mod {b}", "{a} (mod {b})", "{a} to the power of {b}",
    "{a} and a half", "{a} point {b}", "the {a}th", "{a}th", "step {a}", "option {a} or {b}", "case {a}",
    "number {a} or {b}", "x is not {a}", "x is more than {a}", "x is {a} or {b}", "x is between {a} and {b}",
    "x is {a} and y is {b}", "x = {a}, y = {b}", "x = {a} and y = {b}", "x = {a} or x = {b}", "x > {a}",
    "x >= {a}", "x != {a}", "Tom has {a} and Ann has {b}", "Tom has {a}, Ann has {b}",
    "Tom has {a} apples while Ann has {b}", "Tom has {a} more than Ann's {b}", "Tom has {a} times as many as {b}",
    "Tom does not have {a} apples", "Tom has no more than {a} apples", "Tom has at least {a} apples",
    "Tom never had {a} apples", "if Tom has {a} apples, Ann has {b}", "it is not {a}", "it isn't {a}",
    "it can't be {a}", "it cannot be {a}", "it could be {a}", "it may be {a} or {b}", "maybe {a}", "perhaps {a}",
    "possibly {a}", "probably {a}", "I doubt it is {a}", "anything but {a}", "any number except {a}",
    "all numbers except {a}", "a multiple of {a}", "a factor of {a}", "a divisor of {a}", "divisible by {a}",
    "the number after {a}", "the number before {a}", "one more than {a}", "one less than {a}", "{a}? No, {b}",
    "{a}? {b}?", "{a} (or {b})", "{a} (maybe {b})", "{a}, maybe {b}", "{a}, but maybe {b}",
    "{a}, but {b} is possible", "{a}, so {b}", "{a}, then {b}", "{a}, which makes {b} in total", "{a}, giving {b}",
    "{a}, hence {b}", "{a} so {b}", "{a} is wrong", "{a} is incorrect", "{a} is not correct",
    "{a} is not the answer", "{a} would be wrong", "{a} does not work", "{a} apples or {b} pears",
    "one of {a} and {b}", "{a} vs {b}", "{a} versus {b}", "{a} compared to {b}", "{a} below zero",
    "{a} degrees below zero", "{a} too many", "undefined at {a}", "undefined for x = {a}", "no solution for {a}",
    "impossible since {a} is odd", "unknown, {a} or {b}", "{a} for x and {b} for y", "{a} for men, {b} for women",
    "{a} when x = {b}, else {b}", "increased by {a}", "{a} short of {b}", "{a} away from {b}", "{a}-{b}",
    "{a}:{b}", "{a}+{b}", "{a}*{b}", "{a}/{b}", "{a}^{b}", "{a}!", "{a}?", "{a} at most", "{a} at least",
    "{a} at best", "{a} at worst", "{a} or fewer", "{a} as an upper bound", "{a} as a lower bound", "{a} when {b}",
    "{a} on {b}", "{a} for {b}", "{a} where {b}", "no more than {a}", "no fewer than {a}", "not less than {a}",
    "{a} plus or minus {b}", "{a} give or take {b}", "{a} minus {b}", "{a} thousand {b}", "{a} hundred {b}",
    "{a} hundredths", "{a} tenths", "{a} thirds", "{a} halves", "{a} quarters of {b}", "half {a}", "one {a}th",
    "a {a}th", "{a} by {b}", "{a} x {b} y", "{a} over {b}", "{a} under {b}", "{a} above {b}", "{a} into {b}",
    "{a} with {b} left over", "{a} and {b} hundredths", "{a} and {b} thousandths", "{a}, {b}, or 5",
    "{a}, {b} or 5", "{a}, {b}, and 5", "{a} and/or {b}", "{a} & {b}", "{a} | {b}", "{a} xor {b}", "{a} nor {b}",
    "{a} then {b}", "{a} followed by {b}", "{a} not {b}x or {b}", "x is {a} if y is {b}", "x is not {a} but {b}y",
    "x is either {a} or {b}", "x is neither {a} nor {b}", "x is at least {a}", "x is at most {a}",
    "x is less than {a}", "x is greater than {a}", "x is about {a} or {b}", "x is close to {a}",
    "x is divisible by {a}", "x is a multiple of {a}", "x is twice {a}", "x is half of {a}", "x is half {a}",
    "x is {a} less than {b}", "x is {a} more than {b}", "x is {a} times {b}", "x is {a} squared",
    "x is negative {a}", "x is minus {a}", "x equals {a} or {b}", "x equals {a} plus {b}", "x is {a} to {b}",
    "x is {a} and a half", "x is {a} percent of {b}", "x is {a} out of {b}", "the total is not {a}",
    "the total isn't {a}", "the total is never {a}", "the total cannot be {a}", "the total can't be {a}",
    "the total might be {a}", "the total could be {a}", "the total may be {a}", "the total is probably {a}",
    "the total is perhaps {a}", "the total is maybe {a}", "whether the total is {a} is unclear",
    "if the total is {a}, the rest is {b}", "unless the total is {a}", "it is false that the total is {a}",
    "it is wrong that the total is {a}", "it is not the case that the total is {a}",
    "nobody knows whether it is {a}", "twice the total is {a}", "half the total is {a}", "double the cost is {a}",
    "the total minus {b} is {a}", "2x is {a}", "2x = {a}", "3 times x is {a}", "-x is {a}", "x + 1 is {a}",
    "x/2 is {a}", "{a}, wait, {b}", "{a} -- no, {b}", "{a} - no, {b}", "{a}, sorry, {b}", "{a}, I mean {b}",
    "{a}, or rather {b}", "{a}, actually {b}", "{a} (correction: {b})", "{a} (actually {b})", "{a} (wrong)",
    "{a} (incorrect)", "{a} (not possible)", "{a} (not correct)", "{a} (base {b})", "{a} in base {b}",
    "{a} base {b}", "base {a}", "{a}_{b}", "{a} (if x > 0)", "{a} (unless x = {b})", "{a} if {b}",
    "{a} only if x is {b}", "Tom has {a} apples, {b} pears", "Tom has {a} apples, but Ann has {b}",
    "Tom has {a} or {b} apples", "Tom has between {a} and {b} apples", "Tom has {a} to {b} apples",
    "Tom has {a}-{b} apples", "Tom has {a} apples or {b} pears",
    "Tom has {a} apples more than Ann has, who has {b}", "Tom has {a}% of {b} apples",
    "Tom has {a}/{b} of the apples", "Tom has {a} dozen apples", "Tom has half of {a} apples",
    "Tom has a third of {a} apples", "Tom has twice {a} apples", "Tom had {a} apples, now {b}",
    "Tom had {a} apples and now has {b}", "Tom has {a} apples; Ann has {b}", "Tom has {a} apples (Ann has {b})",
    "Tom has {a} apples - Ann {b}", "neither Tom nor Ann has {a}", "none of them has {a}", "nobody has {a}",
    "there are no {a}", "there are fewer than {a}", "there are more than {a}", "there are not {a}",
    "there aren't {a}", "there is no {a}", "no, {a}", "no {a}", "zero, not {a}", "{b}x, not {a}",
    "everything except {a}", "all but {a}", "all except {a}", "other than {a}", "different from {a}",
    "unequal to {a}", "not equal to {a}", "unlike {a}", "instead of {a}", "rather than {a}", "as opposed to {a}",
    "{a} against {b}", "{a} compared with {b}", "the larger of {a} and {b}", "the smaller of {a} and {b}",
    "the sum of {a} and {b}", "the product of {a} and {b}", "the difference of {a} and {b}",
    "the quotient of {a} and {b}", "the average of {a} and {b}", "the remainder of {a}", "the reciprocal of {a}",
    "the opposite of {a}", "the negative of {a}", "the inverse of {a}", "the factorial of {a}", "the log of {a}",
    "the sine of {a}", "the next number after {a}", "the number preceding {a}", "the successor of {a}",
    "the predecessor of {a}", "the double of {a}", "the triple of {a}", "the half of {a}", "{a} billion",
    "{a} lakh", "{a} pairs of {b}", "{a} groups of {b}", "{a} sets of {b}", "page {a}", "question {a}",
    "equation ({a})", "figure {a}", "option {a}", "choice {a} or {b}", "part {a}", "chapter {a}", "line {a}",
    "case {a} or {b}", "{a}) {b}", "({a}) {b}", "{a} → {b}", "{a} => {b}", "{a} -> {b}", "{a} ≠ {b}", "{a} < {b}",
    "{a} > {b}", "{a} ≤ x", "x ≤ {a}", "{a} ± {b}", "{a} = {b}",
]
OPENINGS = [*FRAMES.values(), "Answer: {}.", "**Final Answer:** {}", "### Final Answer\n{}", r"\boxed{\text{{}}}"]


@pytest.mark.parametrize("wording", NO_VALUE)
def test_no_value_is_read_where_another_could_be_meant(wording):
    for a, b in (("7", "9"), ("12", "35"), ("3", "20")):
        for opening in OPENINGS:
            response = opening.replace("{}", wording.format(a=a, b=b))
            for fmt in ANSWER_FORMATS:
                assert not states(response, a, fmt) and not states(response, b, fmt), (response, fmt)


# --- named values, conditions, infinity: right or wrong as a bare answer and in a box ---------------------------------

NAMED = [
    (r"\text{Total cost} = \$18", "18"), (r"\text{Area of triangle } ABC = 24", "24"),
    (r"\frac{[ABC]}{[DEF]} = 4", "4"), ("|z| = 5", "5"), (r"AB \cdot BC = 7", "7"),
    (r"\frac{AM}{MB} = \frac12", "1/2"), (r"\frac{AM}{MB}=\frac{1}{2}", "0.5"),
    (r"\frac{NO}{BO}=\frac{1}{\sqrt{6}}", r"\frac{1}{\sqrt{6}}"), ("S_{MBCN}:S=7:32", "7:32"),
    ("V_{1}:V_{2}=11:21", "11:21"), ("AM:MB = 1:2", "1:2"), (r"\text{Area} = 24", "24"),
    (r"\text{Area}=24\text{ cm}^2", "24"), (r"\text{Area}=24\text{ cm}^2", r"24\text{ cm}^2"),
    (r"\text{Total} = 18 \text{ dollars}", "18"), (r"\text{Number of ways} = 10", "10"),
    (r"\text{Probability} = \frac{1}{2}", "1/2"), (r"P(A) = \frac{1}{2}", "1/2"), (r"P(A \cap B) = 0.2", "0.2"),
    (r"P(A|B) = \frac{1}{3}", "1/3"), ("E[X] = 3.5", "3.5"), (r"\mathbb{E}[X] = 3.5", "3.5"),
    (r"\text{Var}(X) = 2", "2"), (r"\angle ABC = 60^\circ", "60"), (r"m\angle A = 60^\circ", "60"),
    ("|AB| = 5", "5"), (r"|\vec{a}| = 5", "5"), (r"|\overrightarrow{AB}| = 5", "5"), ("|z_1 - z_2| = 5", "5"),
    ("|a+b| = 5", "5"), (r"\|v\| = 5", "5"), (r"\lvert z \rvert = 5", "5"), (r"\left|z\right| = 5", "5"),
    (r"\triangle ABC = 24", "24"), (r"S_{\triangle ABC} = 24", "24"), ("[ABC] = 24", "24"), ("AB = 7", "7"),
    (r"\overline{AB} = 7", "7"), ("a + b = 7", "7"), ("m+n=7", "7"), ("a - b = 7", "7"), ("xy = 7", "7"),
    (r"x \cdot y = 7", "7"), (r"x \times y = 7", "7"), (r"PA \cdot PB = 7", "7"),
    (r"PA \cdot PB \cdot PC = 7", "7"), (r"\vec{a} \cdot \vec{b} = 7", "7"), (r"\frac{x}{y} = 7", "7"),
    (r"\dfrac{a}{b} = 7", "7"), (r"\frac{a+b}{c} = 7", "7"), (r"\frac{S_1}{S_2} = 7", "7"),
    (r"\frac{BD}{DC} = \frac{3}{4}", "3/4"), (r"\frac{dy}{dx} = 2x", "2x"), (r"\text{The answer} = 7", "7"),
    (r"\text{Minimum value} = 7", "7"), (r"\text{min} = 7", "7"), (r"\min f = 7", "7"), (r"\max = 7", "7"),
    ("f(2) = 7", "7"), ("f'(2) = 7", "7"), ("f(f(2)) = 7", "7"), ("a_{10} = 7", "7"), ("S_{10} = 7", "7"),
    (r"\gcd(12, 18) = 6", "6"), (r"\text{lcm}(4, 6) = 12", "12"), (r"\det(A) = 7", "7"), (r"\det A = 7", "7"),
    (r"\text{rank}(A) = 2", "2"), (r"\lim_{x \to 0} \frac{\sin x}{x} = 1", "1"),
    (r"\int_0^1 x \, dx = \frac12", "1/2"), (r"\sum_{k=1}^{10} k = 55", "55"),
    (r"\text{Time} = 3 \text{ hours}", "3"), (r"\text{Speed of the car} = 60 \text{ km/h}", "60"),
    (r"\mathrm{Area} = 24", "24"), ("Total = 18", "18"), (r"\text{Cost per apple} = \$0.50", "0.5"),
    (r"\text{Janet's earnings} = \$18", "18"), (r"x_{\max} = 7", "7"), (r"x_{\text{max}} = 7", "7"),
    (r"V_{\text{box}} = 120", "120"), (r"\text{Volume of box } = 120 \text{ cm}^3", "120"),
    (r"\text{Remainder} = 7", "7"), (r"\text{Sum of roots} = 7", "7"), (r"\alpha + \beta = 7", "7"),
    (r"\alpha\beta = 7", "7"), (r"\sin A = \frac12", "1/2"), (r"\tan \theta = 2", "2"),
    (r"\cos(A+B) = 0.5", "1/2"), (r"|A \cup B| = 12", "12"), ("(a, b) = (1, 2)", "(1,2)"),
    (r"\text{Solution: } x = 7", "7"), (r"\therefore x = 7", "7"), (r"\text{Perimeter of } ABCD = 30", "30"),
    (r"\text{Area}(ABC) = 24", "24"), (r"\text{Profit} = 500 - 300 = 200", "200"),
    (r"\text{Total} = 3 + 4 = 7", "7"), (r"A_{\text{shaded}} = 9\pi", r"9\pi"),
]
NOT_NAMED = [
    ("2x = 8", "8"), ("3x = 8", "8"), ("2x + z = 1", "1"), ("x^2 = 25", "25"), ("x^2 + y^2 = 25", "25"),
    (r"\sqrt{x} = 3", "3"), (r"\frac{x}{2} = 4", "4"), (r"\frac{1}{x} = 4", "4"), (r"\frac{x+1}{2} = 4", "4"),
    ("x(x+1) = 5", "5"), ("f(x+1) = 5", "5"), (r"\ln(x+1) = 2", "2"), ("|x - 3| = 5", "5"), ("|2x| = 8", "8"),
    ("-x = 5", "5"), ("2|z| = 5", "5"), ("x + 1 = 5", "5"), ("x - 1 = 5", "5"), ("x/2 = 5", "5"),
    (r"x \ne 5", "5"), ("x > 5", "5"), (r"x \ge 5", "5"), (r"\text{not } x = 5", "5"),
    (r"\text{Twice the cost} = 36", "36"), (r"\text{half the cost} = 18", "18"), (r"2 \text{Total} = 36", "36"),
    (r"2\cdot\text{Total cost} = 36", "36"), (r"\text{Total cost} \ne 18", "18"),
    (r"\text{Total cost} > 18", "18"), (r"\text{Total cost} = 18 \text{ or } 19", "18"),
    (r"\text{Total cost} = 18", "19"), ("|z| = 5", "-5"), (r"\frac{AM}{MB} = \frac12", "2"),
    (r"\frac{AM}{MB} = \frac12", r"\frac{1}{3}"), (r"AB \cdot BC = 7", "8"), ("2AB = 14", "14"),
    ("AB^2 = 49", "49"), ("|z|^2 = 25", "25"), (r"\frac{AM}{2MB} = 3", "3"), ("x = 5, y = 6", "5"),
    ("x = 5, y = 6", "6"), ("AB = 5, BC = 7", "7"), (r"\sin^2 x = 1", "1"), ("e^x = 5", "5"), ("2^x = 8", "8"),
    ("x! = 6", "6"), (r"\binom{n}{2} = 10", "10"), (r"\frac{1}{2}x = 4", "4"), ("0.5x = 4", "4"),
    (r"\text{Area} - 4 = 20", "20"), (r"\text{Area} + 4 = 20", "20"), (r"\text{Area} = 24", "42"),
    (r"\text{Area of } ABC \text{ is not } 24", "24"), ("n^2 = 49", "49"), ("xy = 7", "8"),
    (r"x \text{ or } y = 7", "7"), ("5x = 5", "5"), ("x = y", "y+1"), ("x+y=7", "8"), ("7 = 11a+c", "11a+c+1"),
    ("7 = 11a + c", "c"), ("5", "x + y = 5"), ("5", "2x = 5"), ("1", "2x + z = 1"),
]
QUALIFIED = [
    (r"f(x)=2x \text{ for all real } x", "f(x)=2x"), (r"2x \text{ for all real } x", "2x"),
    (r"2x \text{ for all } x", "2x"), (r"2x \text{ for all real numbers } x", "2x"),
    (r"2x \text{ for any real number } x", "2x"), (r"2x, \text{ for all } x \in \mathbb{R}", "2x"),
    (r"2x \ \forall x \in \mathbb{R}", "2x"), (r"f(x) = 2x, \forall x", "f(x) = 2x"),
    (r"f(x) = 2x \quad \forall x \in \mathbb{R}", "2x"),
    (r"\frac{\pi}{4}+k\pi \text{ for } k \in \mathbb{Z}", r"\frac{\pi}{4}+k\pi, k \in \mathbb{Z}"),
    (r"n\pi, n \in \mathbb{Z}", r"n\pi"), (r"n\pi", r"n\pi, n \in \mathbb{Z}"),
    (r"x = n\pi, n \in \mathbb{Z}", r"n\pi"),
    (r"x = n\pi \text{ where } n \in \mathbb{Z}", r"n\pi, n\in\mathbb{Z}"),
    (r"n\pi \quad (n \in \mathbb{Z})", r"n\pi, n \in \mathbb{Z}"), (r"n\pi \ (n \in \mathbb Z)", r"n\pi"),
    (r"n\pi, \text{ where } n \text{ is an integer}", r"n\pi"), (r"n\pi \text{ for any integer } n", r"n\pi"),
    (r"n\pi \text{ for integer } n", r"n\pi, n \in \mathbb{Z}"), (r"n\pi, \quad n \in \mathbb{Z}", r"n\pi"),
    (r"n\pi, n \in ℤ", r"n\pi, n \in \mathbb{Z}"), (r"5 \text{ when } x = 2", "5"), (r"5 \text{ at } x = 2", "5"),
    (r"5, \text{ when } x = 2", "5"), (r"5 \text{ (when } x = 2)", "5"), (r"5 \text{ where } x = 2", "5"),
    (r"5 \text{ for } x = 2", "5"), (r"\text{exactly } 5", "5"), (r"\text{only } 5", "5"),
    (r"\text{just } 5", "5"), (r"\text{precisely } 5", "5"), (r"5 \text{ exactly}", "5"), (r"5 \text{ only}", "5"),
    (r"5 \text{ in total}", "5"), (r"5 \text{ altogether}", "5"), ("exactly 5", "5"), ("5 in total", "5"),
    (r"\text{approximately } 3.14", "3.14"), (r"2^n \text{ for } n \ge 1", "2^n"), (r"2^n, n \geq 1", "2^n"),
    (r"2^n \text{ for all positive integers } n", "2^n"), (r"2^n \text{ for } n = 0, 1, 2, \ldots", "2^n"),
    (r"2^n - 1 \text{ for all } n \geq 1", "2^n-1"), (r"cx \text{ for some constant } c", "cx"),
    (r"f(x) = cx \text{ where } c \text{ is a constant}", "f(x)=cx"), (r"f(x) = cx, c \in \mathbb{R}", "f(x)=cx"),
    (r"f(x) = x + c \text{ for some } c \in \mathbb{R}", "x+c"), (r"x + 1, x \neq 2", "x+1"),
    (r"\frac{1}{x}, x > 0", r"\frac1x"), (r"\sqrt{x}, x \geq 0", r"\sqrt x"),
    (r"f(x) = \frac{1}{x} \text{ for } x \neq 0", r"\frac1x"),
    (r"f(n) = n \text{ for all } n \in \mathbb{N}", "f(n)=n"),
    (r"f(n) = n \text{ for every positive integer } n", "n"),
    (r"x^2 + C \text{ where } C \text{ is an arbitrary constant}", "x^2+C"),
    (r"x^2 + C, C \in \mathbb{R}", "x^2+C"),
    (r"\frac{n(n+1)}{2} \text{ for } n \in \mathbb{N}", r"\frac{n(n+1)}{2}"),
    (r"5 \text{ with equality when } a = b", "5"), (r"5 \text{ (attained at } x = 2)", "5"),
    (r"5, \text{ attained when } x = 2", "5"), (r"5 \text{ as } n \to \infty", "5"),
    (r"2k\pi \pm \frac{\pi}{3}, k \in \mathbb{Z}", r"2k\pi \pm \frac{\pi}{3}"),
    (r"x = \frac{\pi}{4} + k\pi, \, k \in \mathbb{Z}", r"x = \frac{\pi}{4} + k\pi"),
    (r"\frac{\pi}{4}+k\pi \text{ for all } k \in \mathbb{Z}", r"\frac{\pi}{4}+k\pi \quad (k \in \mathbb{Z})"),
    (r"2x \text{ for all real } x.", "2x"), (r"5 \text{ for all } n", "5"), (r"5 \text{ for every } x", "5"),
    (r"5, \text{ for any } x > 0", "5"), (r"\text{exactly 5}", "5"), (r"5\text{ (exactly)}", "5"),
    (r"5 \text{ times}", "5"), (r"\text{precisely 5}", "5"), (r"5 \text{, when } n = 3", "5"),
    (r"5 \text{ (for } n=3)", "5"), (r"5 \text{ provided } n = 3", "5"), (r"5 \text{ given } n = 3", "5"),
    (r"5 \text{ (at } x=1 \text{)}", "5"), (r"5 \text{ achieved when } a=b", "5"),
    (r"5, \text{ with equality at } a=b", "5"), (r"5 \text{ (minimum)}", "5"),
    (r"f(x)=2x+1 \text{ for all } x\in\mathbb{R}", "2x+1"), (r"f(x)=2x+1, x\in\mathbb{R}", "2x+1"),
    (r"f(x)=2x+1 \text{ for } x\in\mathbb{R}", "2x+1"), (r"f(x) = 2x+1 \text{ for all real numbers } x", "2x+1"),
    (r"f(x) = 2x + 1 \text{ for every real number } x", "2x+1"), (r"f(x)=2x+1\ (x \in \mathbb{R})", "2x+1"),
    (r"2x+1 \text{, where } x \in \mathbb{R}", "2x+1"), (r"2x+1 \text{ for real } x", "2x+1"),
    (r"2x+1\text{ for }x>0", "2x+1"), (r"f(x)=2x+1 \quad \text{for all } x", "2x+1"),
    (r"f(x) = 2x+1 \text{ on } \mathbb{R}", "2x+1"), (r"f(x) = 2x+1 \text{ for all integers } x", "2x+1"),
    (r"\frac{\pi}{6} + 2k\pi", r"\frac{\pi}{6}+2k\pi, k\in\mathbb{Z}"),
    (r"x = \frac{\pi}{6} + 2k\pi, k \in \mathbb{Z}", r"\frac{\pi}{6}+2k\pi, k\in\mathbb{Z}"),
    (r"x=\frac{\pi}{6}+2\pi k \text{ for } k \in \mathbb{Z}", r"\frac{\pi}{6}+2k\pi, k\in\mathbb{Z}"),
    (r"\frac{\pi}{6}+2k\pi \quad (k\in\mathbb{Z})", r"\frac{\pi}{6}+2k\pi, k\in\mathbb{Z}"),
    (r"\frac{\pi}{6}+2k\pi, \text{ where } k \text{ is any integer}", r"\frac{\pi}{6}+2k\pi, k\in\mathbb{Z}"),
    (r"\frac{\pi}{6}+2k\pi \text{ for all integers } k", r"\frac{\pi}{6}+2k\pi, k\in\mathbb{Z}"),
    (r"\frac{\pi}{6}+2k\pi, \; k\in\mathbb{Z}", r"\frac{\pi}{6}+2k\pi, k\in\mathbb{Z}"),
    (r"\frac{\pi}{6}+2k\pi \text{ with } k\in\mathbb{Z}", r"\frac{\pi}{6}+2k\pi, k\in\mathbb{Z}"),
]
NOT_QUALIFIED = [
    ("f(x)=2x^3", "f(x)=2x^3+c"), (r"x \text{ if } x \ge 2", "x"),
    (r"x \text{ for } x > 0 \text{ and } -x \text{ for } x < 0", "x"),
    (r"x \text{ for } x > 0, -x \text{ for } x < 0", "x"), (r"x \text{ for } x > 0, -x \text{ otherwise}", "x"),
    (r"5 \text{ when } x = 2, 7 \text{ when } x = 3", "5"),
    (r"5 \text{ when } x = 2 \text{ and } 7 \text{ when } x = 3", "5"),
    (r"5 \text{ when } x = 2 \text{ or } 7", "5"), (r"5 \text{ for } n = 1, 7 \text{ for } n = 2", "7"),
    (r"5 \text{ or } 7", "5"), (r"\text{at most } 5", "5"), (r"\text{at least } 5", "5"),
    (r"\text{less than } 5", "5"), (r"\text{not exactly } 5", "5"), (r"\text{more than } 5", "5"),
    (r"\text{almost } 5", "5"), (r"\text{nearly } 5", "5"), (r"5 \text{ or more}", "5"),
    (r"5 \text{ or less}", "5"), (r"5 \text{ million}", "5"), (r"5 \text{ when } x = 2", "2"),
    (r"5 \text{ when } x = 2", "7"), (r"2x \text{ for all real } x", "3x"), (r"n\pi, n \in \mathbb{Z}", r"2n\pi"),
    (r"n\pi, n \in \mathbb{N}", r"n\pi, n \in \mathbb{Z}"), ("2^n, n > 1", "2^n, n > 2"), ("x = 2, x > 3", "3"),
    ("x > 1, x < 3", "x > 1"), (r"x \ge 1, x \le 3", r"x \ge 1"), (r"5, 7 \text{ for all } x", "5"),
    (r"5 \text{ with remainder } 2", "5"), (r"5 \text{ remainder } 2", "5"),
    (r"\text{exactly } 5 \text{ or } 6", "5"), (r"\text{exactly } 5 \text{ or } 6", "6"),
    (r"\text{exactly } 6", "5"), (r"x, y \in \mathbb{Z}", "x"), (r"1 \text{ and all odd primes}", "1"),
    (r"1 \text{ for even } n, 2 \text{ for odd } n", "1"),
    (r"1 \text{ if } n \text{ is even}, 2 \text{ if } n \text{ is odd}", "1"),
    (r"5 \text{ except when } x = 2", "5"), (r"5 \text{ unless } x = 2", "5"), (r"5 \text{ but not } 7", "7"),
    ("x + c", r"x, c \in \mathbb{R}"), (r"5 \text{ when } x = 2 \text{, else } 7", "5"),
    (r"\text{only if } 5", "5"), (r"5 \text{ for men, } 7 \text{ for women}", "5"), (r"5 \text{ mod } 7", "5"),
    (r"5 \pmod 7", "5"), (r"5 (\text{mod } 7)", "5"),
    (r"5 \text{ where } x \text{ is not } 2, \text{ otherwise } 7", "5"),
    (r"x=1 \text{ when } y=2; x=2 \text{ when } y=3", "1"),
    (r"x^2 \text{ for } x \ge 0", r"x^2 \text{ for } x \le 0"),
]
INFINITE = [
    ("(-infinity, 5)", r"(-\infty,5)"), ("[2, infinity)", r"[2,\infty)"), (r"(-\infty, 5)", "(-infinity,5)"),
    ("(-Infinity, 5]", r"(-\infty,5]"), (r"(-\text{infinity}, 5)", r"(-\infty,5)"),
    (r"(\text{negative infinity}, 5)", r"(-\infty,5)"), ("(negative infinity, 5)", r"(-\infty,5)"),
    ("(minus infinity, 5)", r"(-\infty,5)"), ("(2, +infinity)", r"(2,\infty)"),
    ("(2, positive infinity)", r"(2,\infty)"), (r"\text{infinity}", r"\infty"), ("infinity", r"\infty"),
    ("-infinity", r"-\infty"), (r"\text{negative infinity}", r"-\infty"), (r"\text{minus infinity}", r"-\infty"),
    (r"\text{Infinity}", r"\infty"), (r"-\text{infinity}", r"-\infty"), ("(-inf, 5)", r"(-\infty,5)"),
    ("[2, inf)", r"[2,\infty)"), ("(-oo, 5)", r"(-\infty,5)"), ("[2, oo)", r"[2,\infty)"),
    ("(-infinity, 1) U (3, infinity)", r"(-\infty,1)\cup(3,\infty)"),
    (r"(-infinity, 1) \cup (3, infinity)", r"(-\infty,1)\cup(3,\infty)"),
    ("(-infinity, infinity)", r"(-\infty,\infty)"), ("(-infinity, infinity)", r"\mathbb{R}"),
    ("x in [2, infinity)", r"[2,\infty)"), (r"x \in [2, infinity)", r"[2,\infty)"), ("(-∞, 5)", r"(-\infty,5)"),
    ("(-INFINITY, 5)", r"(-\infty,5)"), ("(-Inf, 5)", r"(-\infty,5)"),
]
NOT_INFINITE = [
    ("(-infinity, 5]", r"(-\infty,5)"), ("(-infinity, 6)", r"(-\infty,5)"), ("(infinity, 5)", r"(-\infty,5)"),
    ("infinity", r"-\infty"), ("-infinity", r"\infty"), (r"\text{negative infinity}", r"\infty"),
    ("infinitely many", r"\infty"), (r"\text{infinite}", r"-\infty"), ("inf", r"\infty"),
    ("[2, infinity]", r"[2,\infty)"), ("(2, infinity)", r"[2,\infty)"), ("infinity", "5"),
    (r"\text{not infinity}", r"\infty"), (r"\text{less than infinity}", r"\infty"),
    ("(-infinity, 1) U (3, infinity)", r"(-\infty,1)\cup(2,\infty)"),
    (r"\text{plus or minus infinity}", r"\infty"), ("info", r"\infty"), (r"\text{finite}", r"\infty"),
    ("2 infinity", r"\infty"),
]
IN_A_BOX = [  # not as a bare answer
    (r"\text{Total cost: } \$18", "18"), (r"\text{Total: }18", "18"), ("Total cost = 18", "18"),
    (r"\text{Answer: } x = 7", "7"),
    (r"\text{a total of } 5", "5"), (r"\text{Exactly } 5", "5"), (r"\text{the minimum is } 5", "5"),
]


def box(answer):
    return rf"So we get \boxed{{{answer}}}."


@pytest.mark.parametrize("answer, reference", NAMED + QUALIFIED + INFINITE)
def test_a_name_and_a_condition_are_no_part_of_the_value(answer, reference):
    assert is_correct(answer, reference) and is_correct(box(answer), reference)


@pytest.mark.parametrize("answer, reference", NOT_NAMED + NOT_QUALIFIED + NOT_INFINITE)
def test_what_changes_the_value_is_no_name_and_no_condition(answer, reference):
    assert not is_correct(answer, reference) and not is_correct(box(answer), reference)


@pytest.mark.parametrize("answer, reference", IN_A_BOX)
def test_words_in_a_box_are_read_like_a_sentence(answer, reference):
    assert states(box(answer), reference, "boxed") and not states(box(f"{answer} or 0"), reference)


# --- statements in statements, headings, tags, underscores ------------------------------------------------------------

STATED = {  # format: responses that state 7 in it
    "hash": [
        r"#### \boxed{7}", r"#### $\boxed{7}$", r"#### \(\boxed{7}\)", r"#### **$\boxed{7}$**", r"#### \fbox{7}",
        r"#### $\boxed{7\text{ apples}}$", r"#### The answer is $\boxed{7}$.", "#### Answer: 7", "#### Answer = 7",
        "#### **Final Answer: 7**", "#### Final Answer: **7**", "#### ANSWER: 7", "#### __7__", "#### _7_",
        "#### ___7___",
        "#### _$7$_", "#### __7 apples__", "#### __7__ apples", "#### __Answer:__ 7", "<answer>#### 7</answer>",
    ],
    "boxed": [
        r"\boxed{\text{The answer is } 7}", r"\boxed{Answer: 7}", r"\boxed{\text{Answer: 7}}", r"\boxed{\boxed{7}}",
        r"\boxed{\text{The answer is 7.}}", r"\boxed{\textbf{Final Answer: } 7}", r"\boxed{\mathbf{Answer: 7}}",
        r"\boxed{\text{Answer} = 7}", r"\boxed{#### 7}", r"\boxed{\#\#\#\# 7}", r"\boxed{$7$}", r"\boxed{**7**}",
        r"\boxed{\text{So the answer is } 7 \text{ apples}}", r"\boxed{\text{Tom has } 7 \text{ apples}}",
        r"\boxed{\text{Tom has 7 apples}}", r"\boxed{\text{There are } 7}", r"\boxed{\text{It is } 7}",
        r"\boxed{__7__}",
        r"\boxed{\text{Thus, } x = 7}", r"\boxed{\text{the answer is }\boxed{7}}", r"\framebox{7}",
        r"<answer>\boxed{7}</answer>",
    ],
    "phrase": [
        r"The answer is \boxed{7}.", "The answer is #### 7", "The answer is: Answer: 7",
        "The answer is that it is 7.",
        "Final Answer: The final answer is $7$. I hope it is correct.", "<answer>The answer is 7</answer>",
        "The answer to the problem is 7.", "The answer should be 7.", "The answer equals 7.", "Answer = 7",
        "Answer – 7",
        "**The answer** is 7.", "The **answer** is 7.", "### Final Answer\n**7**", "### Final Answer\n\n7",
        "# Answer\n7",
        "**Final Answer**\n\n$7$", "**Final Answer**\n\n\\[ 7 \\]", "**Answer**\n7", "Final Answer\n\n7.",
        "Answer\n7",
        "### Final answer\nTom has 7 apples.", "#### Final Answer\n**7**", "### ✅ Final Answer\n7",
        "### 5. Final Answer\n7",
        "### Step 5: Final Answer\n7", "### **Final Answer**\n7", "FINAL ANSWER\n7", "### Final Answer\n\n$$\n7\n$$",
        "### Final Answer\n\n7\n\n### Check\n3 + 4 is 7.", "__Answer:__ 7", "_Answer:_ 7", "__Answer__: 7",
        "_Answer_: _7_",
        "__Final Answer__\n\n__7__", "The answer is _7_.", "The answer is __7__.", "The answer is _7._",
        "_The answer is 7._",
        "__The answer is 7__.", "The answer is ___7___.", "The answer is _$7$_.", "The answer is __7__ apples.",
        "__The answer__ is 7", "The answer _is_ 7", "Answer: __x_1 = 7__", "Answer: **_7_**",
    ],
    "tags": [
        "<think>3+4</think><answer>7</answer>", "<answer>\n7\n</answer>", "<answer>$7$</answer>",
        "<answer>x = 7</answer>",
        "<answer>Tom has 7 apples.</answer>", "<answer>\\boxed{7}</answer>", "<answer>#### 7</answer>",
        "<answer>\nThe answer is 7.\n</answer>", "<answer>3+4=7, so\n\\boxed{7}</answer>", "<answer>**7**</answer>",
        "<answer>8</answer> No: <answer>7</answer>", "<answer>7</answer>\nI hope this helps!",
        "<answer>__7__</answer>",
        "<answer>7</answer><|im_end|><answer>8</answer>",
    ],
}
NOT_STATED = {  # format: responses that do not state 7 in it
    "any": [
        "### Final Answer\n7 or 8", "### Final Answer\nnot 7", "### Final Answer", "7\n### Final Answer\n8",
        "### Answer the question\n7", "I will answer\n7", "### Final Answer\n1. 7\n2. 8",
        "### Final Answer\n- 7\n- 8",
        "The answer is _not_ 7.", "The answer is _7_ or _8_.", "The answer is x_7.", "The answer is 7_8.",
        "The answer is ____.",
        "<think><answer>7</answer></think> 8", r"<answer>7</answer> \boxed{8}", r"\boxed{7} <answer>8</answer>",
        "The answer to this 7-part question is 8.", "The answer is 7!.", "<|im_end|>The answer is 7.",
        "The answer is D, it makes no sense for it to be 7 or A.", r"\boxed{7}? <answer>",
    ],
    "hash": [
        r"#### $\boxed{7}$ or $\boxed{8}$", r"#### $\boxed{8}$ or $\boxed{7}$", r"#### not $\boxed{7}$",
        r"#### $2\boxed{7}$",
        "#### Answer: 7 or 8", "#### Answer: not 7", "#### 5. The answer is 7", "#### Step 7",
        "#### 7. Find the total",
        "#### 7 which we ignore", "#### Check: is 7 right?", "#### Verify that 7 works", "<answer>7</answer>",
        "Answer: 7",
    ],
    "boxed": [
        r"\boxed{\text{The answer is not } 7}", r"\boxed{\text{The answer is } 7 \text{ or } 8}",
        r"\boxed{\text{not } 7}",
        r"\boxed{\text{Answer: } 7, 8}", r"\boxed{\text{Tom has 7 apples and 8 pears}}", r"\boxed{\text{7 is wrong}}",
        r"\boxed{\text{No solution except 7}}", "<answer>7</answer>", "#### 7", "Answer: 7",
    ],
    "phrase": ["<answer>7</answer>", "#### 7", r"\boxed{7}", "7 is it."],
    "tags": [
        "<answer>7", "<answer></answer> 7", "<answer>7</answer> <answer>", "<answer>7</answer> <answer>8</answer>",
        "<answer>7\n8</answer>", r"<answer>\boxed{7} or \boxed{8}</answer>", "<answer>3+4=7\n8</answer>",
        r"\boxed{7}",
        "#### 7", "The answer is 7", "<answer>8</answer> The answer is 7",
    ],
}


@pytest.mark.parametrize("fmt, response", [(fmt, response) for fmt in STATED for response in STATED[fmt]])
def test_other_forms_of_a_statement_are_read(fmt, response):
    assert states(response, "7", fmt) and lenient_correct(response, "7"), extract_answer(response, fmt)
    assert not states(response, "8", fmt)


@pytest.mark.parametrize("fmt, response", [(fmt, response) for fmt in NOT_STATED for response in NOT_STATED[fmt]])
def test_what_is_no_statement_in_the_format_is_not_read(fmt, response):
    assert not states(response, "7", fmt), extract_answer(response, fmt)


@pytest.mark.parametrize("response", [
    "so 12", "It costs $12.", "12.", r"\boxed{5} or 12", "The answer is 5, not 12", "#### 5 or 12", "Final: 1,2, 12 ",
    "<answer>5</answer> 12", r"\boxed{} 12", "The answer is ... 12"])
def test_lenient_is_never_below_the_last_number(response):
    """lm-eval's flexible-extract and VERL's flexible reading find 12."""
    assert re.findall(r"-?[$0-9.,]{2,}|-?[0-9]+", response)[-1].strip("$.,") == "12"
    assert lenient_correct(response, "12")


# --- the public trials ------------------------------------------------------------------------------------------------

@pytest.mark.skipif(not CASES.is_file(), reason="the public trials are not beside this checkout")
def test_the_public_trials_are_judged_as_they_are_labelled():
    cases = [json.loads(line) for line in CASES.read_text(encoding="utf-8").splitlines()]
    assert len(cases) >= 30
    for case in cases:
        right = {"strict": states(case["response"], case["reference"], case["answer_format"]),
                 "lenient": lenient_correct(case["response"], case["reference"])}
        assert all(right[key] == label for key, label in case["right"].items() if label is not None), (case, right)
