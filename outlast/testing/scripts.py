"""What the model says in the examples and the demo."""

from outlast.testing.chat import Reply, ToolCall, by_turn

WEATHER_REPLIES = [
    Reply(tool_calls=[ToolCall("get_weather", {"city": "Paris"}), ToolCall("get_weather", {"city": "Lisbon"})]),
    Reply("Lisbon it is.", tool_calls=[ToolCall("find_hotel", {"city": "Lisbon"})]),
    Reply(tool_calls=[ToolCall("book_hotel", {"hotel": "Hotel Mirador", "nights": 2})]),
    Reply("It is sunny in Lisbon and it rains in Paris, so I booked you two nights at the Hotel Mirador in Lisbon."),
]

weather = by_turn(WEATHER_REPLIES)
"""The model of examples/weather_agent.py: the weather in two cities at once, then a hotel, a booking, an answer."""
